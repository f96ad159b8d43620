"""IRS, interventional robustness score (Suter et al., 2019): change of a unit while its factor is fixed."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import FACTOR_CODE_BATCH, FactorSampler, Representation, factor_codes, histogram_codes


def irs(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    batch_size: int = FACTOR_CODE_BATCH,
    diff_quantile: float = 0.99,
    num_bins: int = 20,
) -> dict[str, float]:
    """Return how little each unit changes while the factor that determines it best is fixed.

    Suter, Miladinovic, Schoelkopf, Bauer: Robustly disentangled causal mechanisms, ICML 2019. The score of a unit is
    the largest over factors of 1 - (deviation from the group mean, averaged over the groups of equal factor value) /
    (largest deviation from the overall mean); the mean over units has it as weight. Higher is better. Milliseconds.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes.
        batch_size: codes drawn at once; another number gives another random stream.
        diff_quantile: quantile of the deviations in a group; 1 in the paper, 0.99 in disentanglement_lib.
        num_bins: bins of the factor values: values of finer factors are grouped.

    Returns:
        ``IRS`` in [0, 1], 0 if no unit varies; ``num_active_dims`` as in disentanglement_lib, which is the *sum of the
        codes* of the units that vary; ``num_active_true``, the number of those units.
    """
    codes, labels = factor_codes(representation, sampler, num_train, random_state, batch_size)
    active = codes[:, (codes != codes[0]).any(axis=0)]  # a variance may be rounded to more than 0
    score = robustness(histogram_codes(labels, num_bins), active, diff_quantile) if active.shape[1] else 0.0
    return {"IRS": score, "num_active_dims": float(active.sum()), "num_active_true": active.shape[1]}


def robustness(labels: np.ndarray, codes: np.ndarray, diff_quantile: float) -> float:
    """Return the score of units that all vary.

    Args:
        labels: (n, F) int.
        codes: (n, K).
        diff_quantile: in [0, 1].
    """
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)  # (K,)
    held = np.zeros((codes.shape[1], labels.shape[1]))
    for factor, column in enumerate(labels.T):
        groups = [codes[column == value] for value in np.unique(column)]
        deviations = [np.abs(group - group.mean(axis=0)) for group in groups]
        held[:, factor] = np.mean([np.percentile(group, 100 * diff_quantile, axis=0) for group in deviations], axis=0)
    scores = (1.0 - held / largest[:, None]).max(axis=1)
    return float(np.average(scores, weights=largest))
