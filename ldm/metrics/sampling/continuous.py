"""Continuous factors: division of a column into bins, and the values behind drawn labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.metrics import common
from ldm.metrics.common import FactorSampler, MetricError, Representation
from ldm.util import did_you_mean

MOST_BINS = 1000
WAYS = ("equal_width", "equal_frequency", "edges")


@runtime_checkable
class ValuedSampler(Protocol):
    """Factor sampler that has the values behind its labels, such as ``FactorTable``."""

    factor_values: Sequence[np.ndarray]  # values of each factor; labels are indices into them


def discretize(column: Any, how: str = "equal_width", bins: int | Sequence[float] = 20) -> tuple[np.ndarray, str]:
    """Divide a continuous factor into bins.

    Args:
        column: (N,) finite numbers.
        how: ``equal_width``, bins over the range, as disentanglement_lib discretizes codes; ``equal_frequency``, bins
            between quantiles, where equal values stay together; ``edges``, bins that start at given edges.
        bins: number of bins, 2 to 1000; for ``edges`` the ascending inner edges, one fewer than bins.

    Returns:
        Bins (N,) int64 from 0, some of which may be empty, and the name of the discretization for results.

    Raises:
        MetricError: the column is not numeric or not finite, or the bins are not valid.

    Example:
        >>> discretize([0.0, 0.1, 0.2, 1.0], "equal_frequency", 2)
        (array([0, 0, 1, 1]), '2 bins of equal frequency')
        >>> discretize([0.0, 0.1, 0.2, 1.0], "edges", [0.1, 0.5])[0].tolist()
        [0, 1, 1, 2]
    """
    values = np.asarray(column)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "fiub":
        raise MetricError(f"discretization: expected (N,) numbers, got {values.dtype} of shape {values.shape}.")
    values = values.astype(np.float64)
    row = int(np.argmin(np.isfinite(values)))
    if not np.isfinite(values[row]):
        raise MetricError(f"discretization: expected finite numbers, got {values[row]} in row {row}.")
    if how not in WAYS:
        raise MetricError(f"discretization: expected one of {', '.join(WAYS)}, got {how!r}.{did_you_mean(how, WAYS)}")
    if how == "edges":
        edges = np.asarray(bins)
        is_numeric = edges.ndim == 1 and len(edges) and edges.dtype.kind in "fiu"
        if not is_numeric or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise MetricError(f"discretization: expected ascending finite edges, got {bins}.")
        return np.digitize(values, edges), f"edges {', '.join(f'{edge:g}' for edge in edges)}"
    if not isinstance(bins, int | np.integer) or bins < 2:
        raise MetricError(f"discretization: expected at least 2 bins, got {bins!r}.")
    if bins > MOST_BINS:
        raise MetricError(f"discretization: expected at most {MOST_BINS} bins, got {bins}.")
    if how == "equal_width":
        edges = np.histogram(values, bins)[1][1:-1]
    else:
        edges = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    return np.digitize(values, edges), f"{bins} bins of {how.replace('_', ' ')}"


def quantities(sampler: FactorSampler, labels: np.ndarray) -> np.ndarray:
    """Return the values of labels (n, F) as float64: numbers of a ``ValuedSampler``, or else indices of values."""
    columns = labels.T.astype(np.float64)
    for factor, values in enumerate(sampler.factor_values if isinstance(sampler, ValuedSampler) else ()):
        if values.dtype.kind in "fiub":
            columns[factor] = values[labels[:, factor]]
    return columns.T


def quantity_codes(
    representation: Representation,
    sampler: FactorSampler,
    num_train: int,
    num_test: int,
    random_state: np.random.RandomState,
    metric: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw training codes (n, K) and values (n, F), then test codes and values, as ``common.train_test_codes``.

    All are float64 and scaled to mean 0 and deviation 1 in the training sample; a unit that does not vary is 0.

    Raises:
        MetricError: a factor takes a single value in the training sample.
    """
    sample = common.train_test_codes(representation, sampler, num_train, num_test, random_state)
    codes, labels, test_codes, test_labels = sample
    common.require_varying(labels, metric)
    codes, test_codes = common.standardized(codes.astype(np.float64), test_codes.astype(np.float64))
    values, test_values = common.standardized(quantities(sampler, labels), quantities(sampler, test_labels))
    return codes, values, test_codes, test_values
