"""MCC, mean correlation coefficient of matched units and factors, the score of identifiability studies."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import FactorSampler, Representation
from ldm.metrics.sampling.continuous import quantity_codes

RANK_TOLERANCE = 1e-9  # singular values below this share of the largest are zero: repeated or constant units


def mcc(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_test: int = 5000,
) -> dict[str, float]:
    """Return the mean absolute correlation of each factor with the unit that is matched to it.

    Hyvarinen, Morioka: Unsupervised feature extraction by time-contrastive learning and nonlinear ICA, NIPS 2016;
    Khemakhem, Monti, Kingma, Hyvarinen: ICE-BeeM, NeurIPS 2020. Strong MCC matches single units, weak MCC the linear
    combinations that a canonical correlation analysis finds. Matching (Hungarian method) and analysis are fitted on
    training codes and measured on test codes, as in the authors' code (ilkhem/icebeem, ``metrics/mcc.py``,
    ``mean_corr_coef_out_of_sample``). Factors without a unit, if there are fewer units, have correlation 0. Factors
    are quantities, see ``ldm.metrics.sampling.continuous.quantities``. Higher is better. Milliseconds.

    Args:
        representation, sampler, random_state: see ``ldm.metrics.common``.
        num_train: labelled codes of the matching and the analysis.
        num_test: labelled codes of the correlations.

    Returns:
        ``mcc`` and ``weak_mcc`` (Pearson), ``mcc_spearman`` and ``weak_mcc_spearman`` (rank correlation), in [0, 1].

    Raises:
        MetricError: a factor takes a single value.
    """
    from scipy.stats import rankdata

    sample = quantity_codes(representation, sampler, num_train, num_test, random_state, "MCC")
    axes = canonical_axes(*sample[:2])
    scores = {}
    for name, parts in {"mcc": sample, "weak_mcc": [part @ axes[i % 2] for i, part in enumerate(sample)]}.items():
        scores[name] = matched_correlation(*parts) / sample[1].shape[1]
        ranks = (rankdata(part, axis=0) for part in parts)
        scores[f"{name}_spearman"] = matched_correlation(*ranks) / sample[1].shape[1]
    return scores


def matched_correlation(
    codes: np.ndarray, values: np.ndarray, test_codes: np.ndarray, test_values: np.ndarray
) -> float:
    """Return the sum of absolute test correlations over the pairs with the largest sum of training correlations."""
    from scipy.optimize import linear_sum_assignment

    pairs = linear_sum_assignment(correlations(codes, values), maximize=True)
    return float(correlations(test_codes, test_values)[pairs].sum())


def correlations(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the absolute correlation of the columns of (n, K) and (n, F), (K, F); 0 for a column that is constant."""
    scaled = []
    for columns in (codes, values):
        centred = np.where((columns != columns[0]).any(axis=0), columns - columns.mean(axis=0), 0.0)
        norms = np.linalg.norm(centred, axis=0)
        scaled.append(centred / np.where(norms > 0, norms, 1.0))
    return np.minimum(np.abs(scaled[0].T @ scaled[1]), 1.0)


def canonical_axes(codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of a canonical correlation analysis of (n, K) and (n, F) with means 0: (K, C) and (F, C)."""
    bases, back = zip(*(_whitened(columns) for columns in (codes, values)))
    left, _, right = np.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    return back[0] @ left, back[1] @ right.T


def _whitened(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an orthonormal basis of the columns (n, K), (n, R), and the weights (K, R) that lead to it."""
    basis, sizes, axes = np.linalg.svd(columns, full_matrices=False)
    kept = sizes > max(sizes.max(), 1.0) * RANK_TOLERANCE
    return basis[:, kept], axes[kept].T / sizes[kept]
