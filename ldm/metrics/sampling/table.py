"""Sampler for data sets whose factor values are in a table, one row per image.

A table that contains every combination of values is sampled as in disentanglement_lib: factor by factor, then a row
with these values, at random if there are several. With one row per combination the draws are those of a
``FactorSpace``. If combinations are missing, *rows* are drawn with the same probability; where a metric fixes the value
of a factor, it draws from the rows with that value. Such scores are comparable only for the same table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.metrics.common import MetricError

MOST_COMBINATIONS = 2**62  # numbers of combinations must fit in int64
MOST_FACTORS = 256


class FactorTable:
    """Factor values of each row of a data set.

    Args:
        factors: (N, F) integers, strings or floats (equal ones are one value), or anything that ``numpy.asarray``
            converts to that, such as a data frame.
        names: names of the F factors; None takes the column names of a data frame, or numbers.

    Raises:
        MetricError: there are not two axes, no rows, values that are not finite, or a column that looks continuous.

    Example:
        >>> table = FactorTable([["red", 3], ["red", 5], ["blue", 3]])
        >>> table.factors_num_values, table.is_complete
        ((2, 2), False)
    """

    def __init__(self, factors: Any, names: Sequence[str] | None = None) -> None:
        names = getattr(factors, "columns", None) if names is None else names
        factors = np.asarray(factors)
        if factors.ndim != 2 or 0 in factors.shape:
            raise MetricError(
                f"factors: expected shape (N, F), a row per image and a column per factor; got {factors.shape}."
            )
        self.num_factors = factors.shape[1]
        if self.num_factors > MOST_FACTORS:
            raise MetricError(
                f"factors: expected at most {MOST_FACTORS} columns, got shape {factors.shape}. If the images are in "
                "the columns, pass factors.T."
            )
        names = [f"factor {number}" for number in range(self.num_factors)] if names is None else names
        self.factor_names = tuple(str(name) for name in names)
        if len(self.factor_names) != self.num_factors:
            raise MetricError(f"names: expected {self.num_factors}, one per factor; got {self.factor_names}.")
        columns = [_ranks(column, name) for column, name in zip(factors.T, self.factor_names)]
        self.factor_values = tuple(values for values, _ in columns)
        self.factors_num_values = tuple(len(values) for values in self.factor_values)
        self._labels = np.stack([ranks for _, ranks in columns], axis=1)  # (N, F) int64
        self._combinations = _Groups.of(self._labels @ self._bases)

    @property
    def size(self) -> int:
        """Number of rows N."""
        return len(self._labels)

    @property
    def is_complete(self) -> bool:
        """Whether the table contains every combination of values."""
        return len(self._combinations.keys) == math.prod(self.factors_num_values)

    @property
    def has_copies(self) -> bool:
        """Whether a combination has several rows."""
        return len(self._combinations.keys) < self.size

    @property
    def product_sizes(self) -> tuple[int, ...] | None:
        """``factors_num_values`` if factors are independent and each combination has one row; else None."""
        return self.factors_num_values if self.is_complete and not self.has_copies else None

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) int64, indices into ``factor_values``: per factor, or those of drawn rows."""
        if self.is_complete:
            columns = [random_state.randint(size, size=num) for size in self.factors_num_values]
            return np.stack(columns, axis=1).astype(np.int64)
        return self._labels[random_state.randint(self.size, size=num)]

    def hold_fixed(
        self, factors: np.ndarray, factor: int, values: np.ndarray | int, random_state: np.random.RandomState
    ) -> np.ndarray:
        """Return draws like ``factors`` (n, F) that have the given values (a number, or (n,)) in one factor.

        In a complete table the other factors are kept; otherwise each row is redrawn from those with its value.
        """
        if self.is_complete:
            return np.where(np.arange(self.num_factors) == factor, np.reshape(values, (-1, 1)), factors)
        return self._labels[self._by_value[factor].draw(np.broadcast_to(values, len(factors)), random_state)]

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Return rows (n,) int64 with the values (n, F), each of several with the same probability.

        Raises:
            MetricError: a combination has no row.
        """
        wanted = factors @ self._bases
        groups = self._combinations
        indices = np.minimum(np.searchsorted(groups.keys, wanted), len(groups.keys) - 1)
        missing = groups.keys[indices] != wanted
        if missing.any():
            raise MetricError(f"the table has no row with the value indices {factors[np.argmax(missing)].tolist()}.")
        return groups.draw(indices, random_state)

    @functools.cached_property
    def _bases(self) -> np.ndarray:
        """Factors of the value indices in the number of a combination."""
        if math.prod(self.factors_num_values) >= MOST_COMBINATIONS:
            raise MetricError(
                f"factors: {self.factors_num_values} values have too many combinations and look continuous. Bin them "
                "(numpy.digitize), or leave some out."
            )
        return np.cumprod((1, *self.factors_num_values[:0:-1]), dtype=np.int64)[::-1]

    @functools.cached_property
    def _by_value(self) -> tuple[_Groups, ...]:
        return tuple(_Groups.of(column) for column in self._labels.T)


class _Groups(NamedTuple):
    """Rows grouped by a key."""

    keys: np.ndarray  # (G,) ascending
    starts: np.ndarray  # (G,) first position of each group in ``rows``
    counts: np.ndarray  # (G,) number of rows of each group
    rows: np.ndarray  # (N,) rows, group by group

    @classmethod
    def of(cls, keys: np.ndarray) -> _Groups:
        """Group rows by their keys (N,)."""
        found, starts, counts = np.unique(np.sort(keys), return_index=True, return_counts=True)
        return cls(found, starts, counts, np.argsort(keys, kind="stable"))

    def draw(self, groups: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Draw a row of each of ``groups`` (n,); if every group has one row, the generator is not used."""
        if len(self.keys) == len(self.rows):
            return self.rows[groups]
        return self.rows[self.starts[groups] + random_state.randint(self.counts[groups])]


def _ranks(column: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of a factor, ascending, and the index of the value of each row (N,) int64."""
    if column.dtype == object:  # a table of several types: find that of the column
        row = next((row for row, value in enumerate(column) if value is None or value != value), None)  # None or NaN
        if row is not None:
            raise MetricError(
                f"factors: expected a value in every row, got {column[row]} for {name} in row {row}. Remove these rows "
                "from factors and latents, or leave the column out."
            )
        column = np.array(column.tolist())
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        row = int(np.argmin(np.isfinite(column)))
        raise MetricError(f"factors: expected finite values, got {column[row]} for {name} in row {row}.")
    values, ranks = np.unique(column, return_inverse=True)
    if column.dtype.kind == "f" and len(values) == len(column) > 1:
        raise MetricError(
            f"factors: {name} never has the same value twice in {len(column)} rows and looks continuous. Bin it "
            "(numpy.digitize)."
        )
    return values, ranks.reshape(-1).astype(np.int64)
