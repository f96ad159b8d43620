"""UDR, unsupervised disentanglement ranking (Duan et al., 2020): agreement of models of different seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.metrics.common import FactorSampler, MetricError, Representation, as_lookup, labelled_rows

LEAST_KL = 0.01  # units of lower divergence are set to zero before the comparison, independently of the filter


def udr(
    representations: Sequence[Representation],
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    kl: Sequence[np.ndarray] | None = None,
    num_data_points: int = 1000,
    batch_size: int = 10,
    correlation_matrix: str = "lasso",
    filter_low_kl: bool = True,
    kl_filter_threshold: float = 0.01,
) -> dict[str, Any]:
    """Rank models without labels: units of a good model are found one for one by other models.

    Duan et al.: Unsupervised model selection for variational disentangled representation learning, ICLR 2020,
    section 4. Higher is better. A second for ten models of ten units.

    Args:
        representations: (N, K) codes of each of R models, at least two, or functions of row indices.
        sampler: factors of the data set; they determine only which rows are drawn.
        random_state: fresh generator.
        kl: for each model (K,) mean Kullback-Leibler divergence of each unit from its prior; None if there is no
            prior, then every unit that varies is used.
        num_data_points: rows drawn, a multiple of ``batch_size``.
        batch_size: rows drawn at once; another number gives another random stream.
        correlation_matrix: "lasso" (weights of a sparse regression of the units of one model from those of another)
            or "spearman" (rank correlations).
        filter_low_kl: leave units of low divergence out of the score.
        kl_filter_threshold: divergence up to which a unit is left out.

    Returns:
        ``raw_correlations`` (R, R, K, K), ``pairwise_disentanglement_scores`` (R, R, 1) and ``model_scores`` (R,),
        the median of the scores of each model against the others, as nested lists; scores are in [0, 1] up to the
        scale of the regression weights.

    Raises:
        MetricError: there are fewer than two models, their widths differ, the matrix is unknown, or the number of
            points is not a multiple of the batch size.
    """
    correlations = {"lasso": lasso_weights, "spearman": rank_correlations}
    if correlation_matrix not in correlations:
        raise MetricError(f"correlation_matrix: expected one of {', '.join(correlations)}; got {correlation_matrix!r}.")
    if num_data_points % batch_size:
        raise MetricError(f"num_data_points: expected a multiple of batch_size ({batch_size}), got {num_data_points}.")
    rows, _ = labelled_rows(sampler, num_data_points, random_state, batch_size)
    codes, divergences = _standardized(representations, rows, kl)
    num_models, num_units = len(codes), codes[0].shape[1]
    matrices = np.zeros((num_models, num_models, num_units, num_units))
    scores = np.zeros((num_models, num_models))
    for i, j in itertools.permutations(range(num_models), 2):
        matrices[i, j] = matrix = correlations[correlation_matrix](codes[i], codes[j])
        if filter_low_kl:
            matrix = matrix[divergences[i] > kl_filter_threshold][:, divergences[j] > kl_filter_threshold]
        scores[i, j] = relative_strength(matrix)
    others = [np.delete(scores[:, model], model) for model in range(num_models)]
    return {
        "raw_correlations": matrices.tolist(),
        "pairwise_disentanglement_scores": scores[:, :, None].tolist(),
        "model_scores": [float(np.median(column)) for column in others],
    }


def relative_strength(matrix: np.ndarray) -> float:
    """Return the mean over columns and rows of largest squared / sum; 0 for those without correlation.

    Args:
        matrix: (A, B), not negative.
    """
    if 0 in matrix.shape:
        return 0.0
    sides = []
    for axis in (0, 1):
        total = matrix.sum(axis=axis)
        share = matrix.max(axis=axis) ** 2 / np.where(total > 0, total, 1.0)
        sides.append(np.nan_to_num(share).mean())
    return float(np.mean(sides))


def lasso_weights(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the magnitudes (K, K) of the weights that predict units of ``second`` (columns) from ``first`` (rows)."""
    from sklearn.linear_model import Lasso

    return np.abs(Lasso(alpha=0.1).fit(first, second).coef_).T


def rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the magnitudes (K, K) of Spearman's correlations of units of ``first`` (rows) and ``second``; NaN for
    constant units."""
    from scipy.stats import rankdata

    num_units = first.shape[1]
    with np.errstate(invalid="ignore"):  # constant units
        together = np.corrcoef(np.hstack([rankdata(first, axis=0), rankdata(second, axis=0)]).T)
    return np.abs(together[:num_units, num_units:])


def _standardized(
    representations: Sequence[Representation], rows: np.ndarray, kl: Sequence[np.ndarray] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the standardized codes (n, K) of each model, zero for uninformative units, and its divergences (K,)."""
    if len(representations) < 2:
        raise MetricError(f"UDR: expected at least 2 models to compare, got {len(representations)}.")
    drawn = [as_lookup(representation)(rows).astype(np.float64) for representation in representations]
    widths = [codes.shape[1] for codes in drawn]
    if len(set(widths)) > 1:
        raise MetricError(f"UDR: expected models with the same number of units, got {widths}.")
    if kl is None:
        kl = [np.where((codes != codes[0]).any(axis=0), np.inf, 0.0) for codes in drawn]
    divergences = [np.asarray(divergence, dtype=np.float64) for divergence in kl]
    shapes = [divergence.shape for divergence in divergences]
    if shapes != [(width,) for width in widths]:
        raise MetricError(f"kl: expected ({widths[0]},) divergences for each of {len(drawn)} models, got {shapes}.")
    scaled = []
    for codes, divergence in zip(drawn, divergences):
        deviation = codes.std(axis=0)
        centred = (codes - codes.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        scaled.append(centred * (divergence > LEAST_KL))
    return scaled, divergences
