"""IRS, interventional robustness score (Suter et al., 2019): does a unit stay put while its factor is held?"""

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
    """How little each unit moves once the factor that binds it most is held, relative to how far it moves at all.

    Suter, Miladinovic, Schoelkopf, Bauer: Robustly disentangled causal mechanisms, ICML 2019. A unit's score is the
    largest over factors of 1 - (deviation from the group's mean, averaged over the groups of equal factor value) /
    (largest deviation from the mean of all); the mean over units weighs them by the latter. Higher is better.
    Milliseconds.

    Args:
        representation: (N, K) codes of the whole data set, or a function of row indices.
        sampler: the data set's factors.
        random_state: fresh generator; the published protocol uses seed 0.
        num_train: labelled codes drawn.
        batch_size: codes drawn at once; another number is another random stream.
        diff_quantile: which quantile of a group's deviations counts; 1 in the paper, 0.99 in disentanglement_lib.
        num_bins: bins the factors' values are cut into: values of finer factors are grouped.

    Returns:
        ``IRS`` in [0, 1], 0 if no unit varies; ``num_active_dims`` as disentanglement_lib reports it, which is the
        *sum of the codes* of the units that vary; ``num_active_true``, the number of those units.
    """
    codes, labels = factor_codes(representation, sampler, num_train, random_state, batch_size)
    active = codes[:, codes.var(axis=0) > 0]
    score = robustness(histogram_codes(labels, num_bins), active, diff_quantile) if active.any() else 0.0
    return {"IRS": score, "num_active_dims": float(active.sum()), "num_active_true": active.shape[1]}


def robustness(labels: np.ndarray, codes: np.ndarray, diff_quantile: float) -> float:
    """The score of units that all vary.

    Args:
        labels: (n, F) int.
        codes: (n, K).
        diff_quantile: in [0, 1].
    """
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)  # (K,)
    held = np.zeros((codes.shape[1], labels.shape[1]))
    for factor, column in enumerate(labels.T):
        groups = [codes[column == value] for value in np.unique(column)]
        apart = [np.abs(group - group.mean(axis=0)) for group in groups]
        held[:, factor] = np.mean([np.percentile(group, 100 * diff_quantile, axis=0) for group in apart], axis=0)
    scores = (1.0 - held / largest[:, None]).max(axis=1)
    return float(np.average(scores, weights=largest))
