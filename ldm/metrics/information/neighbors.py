"""Mutual information of continuous units with discrete factors, from nearest neighbours."""

from __future__ import annotations

import numpy as np

from ldm.metrics.common import MetricError

NOISE = 1e-10  # relative size of the noise that breaks ties, as in scikit-learn


def neighbor_information(
    codes: np.ndarray, labels: np.ndarray, random_state: np.random.RandomState, num_neighbors: int = 10
) -> np.ndarray:
    """Return the mutual information in nats (K, F) between units (n, K) and discrete factors (n, F), at least 0.

    Ross: Mutual information between discrete and continuous data sets, PLoS ONE 2014, the variant of Kraskov,
    Stoegbauer, Grassberger (2004): psi(n) + mean of psi(k) - psi(n_y) - psi(m), where n_y rows have the label of a row,
    k <= ``num_neighbors`` of them are counted, and m rows (with the row) are nearer than the k-th. Equal to
    ``mutual_info_classif`` of scikit-learn, from sorted values instead of trees: 0.2 seconds instead of 90 for 20
    units, 6 factors and 10,000 rows. Rows with a label of their own do not count, and a unit that does not vary has 0.
    The noise is the same for all units, so that their order does not matter.

    Raises:
        MetricError: each row has its own value of a factor.
    """
    noise = random_state.standard_normal(len(codes))
    groups = [_groups(column, factor) for factor, column in enumerate(labels.T)]
    information = np.zeros((codes.shape[1], labels.shape[1]))
    deviations = codes.std(axis=0, dtype=np.float64)
    for unit in np.flatnonzero((codes != codes[0]).any(axis=0) & (deviations > 0)):
        values = codes[:, unit] / deviations[unit]
        values = values + NOISE * max(1.0, np.abs(values).mean()) * noise
        for factor, rows in enumerate(groups):
            information[unit, factor] = _information([np.sort(values[group]) for group in rows], num_neighbors)
    return information


def _groups(column: np.ndarray, factor: int) -> list[np.ndarray]:
    """Return the rows of each label that several rows have."""
    order = np.argsort(column, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(column[order])) + 1)
    groups = [rows for rows in groups if len(rows) > 1]
    if not groups:
        raise MetricError(
            f"information of continuous codes: expected rows that share a value of factor {factor}, but each of "
            f"{len(column)} rows has its own. Divide the factor into bins, or leave it out."
        )
    return groups


def _information(groups: list[np.ndarray], num_neighbors: int) -> float:
    """Return the estimate from the sorted values of each label."""
    from scipy.special import digamma

    everything = np.sort(np.concatenate(groups))
    num_rows, total = len(everything), 0.0
    for values in groups:
        neighbors = min(num_neighbors, len(values) - 1)
        near = _num_nearer(everything, values, _distances(values, neighbors))
        total += len(values) * (digamma(neighbors) - digamma(len(values))) - digamma(near).sum()
    return max(0.0, float(digamma(num_rows) + total / num_rows))


def _distances(values: np.ndarray, neighbors: int) -> np.ndarray:
    """Return the distance of each of n sorted values to its k-th nearest other value, (n,): its narrowest window."""
    padded = np.pad(values, neighbors, constant_values=(-np.inf, np.inf))
    ends = np.lib.stride_tricks.sliding_window_view(padded, len(values))  # (2 k + 1, n)
    return np.maximum(values - ends[: neighbors + 1], ends[neighbors:] - values).min(axis=0)


def _num_nearer(everything: np.ndarray, values: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return how many of all sorted values are nearer to each value than its distance, with the value itself."""
    first = np.searchsorted(everything, values - distances, side="right")
    last = np.searchsorted(everything, values + distances, side="left")
    # the sums above are rounded: values at the distance itself do not count
    first += values - everything[np.minimum(first, len(everything) - 1)] >= distances
    last -= everything[last - 1] - values >= distances
    return np.maximum(last - first, 1)
