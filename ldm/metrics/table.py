"""A sampler for any data whose factor values stand in a table, one row per image.

A table that shows every combination of values is drawn from as disentanglement_lib draws: factor after factor, each
value as likely as any other, then a row that shows them (the only one, or one of its copies at random, as for Cars3D's
files of ten). With one row per combination these are, seed by seed, the draws of a ``FactorSpace``.

Where combinations are missing, factors cannot be drawn apart from one another, and the protocol is: draw *rows*,
each as likely as any other; where a metric holds a factor at a value, draw from the rows that share the value. Scores
of such data depend on which combinations there are, and compare only with scores of the same table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.metrics.common import MetricError

MOST_COMBINATIONS = 2**62  # of which each has a number in int64
MOST_FACTORS = 256


class FactorTable:
    """The factor values of each row of a data set.

    Args:
        factors: (N, F) whole numbers, texts or floats (of which equal ones are one value), or anything
            ``numpy.asarray`` makes into that, such as a data frame.
        names: names of the F factors; None takes the columns' names of a data frame, or numbers.

    Raises:
        MetricError: not two axes, no rows, values that are not finite, or a column that looks continuous.

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
                f"factors must be a table of shape (N, F), a row per image, a column per factor; found {factors.shape}"
            )
        self.num_factors = factors.shape[1]
        if self.num_factors > MOST_FACTORS:
            raise MetricError(
                f"factors of shape {factors.shape} have {self.num_factors} columns, and more than {MOST_FACTORS} "
                "factors are not scored: a table has a row per image. If images stand in the columns, pass factors.T."
            )
        self.factor_names = tuple(f"factor {number}" for number in range(self.num_factors))
        if names is not None:
            self.factor_names = tuple(str(name) for name in names)
        if len(self.factor_names) != self.num_factors:
            raise MetricError(f"{len(self.factor_names)} names for {self.num_factors} factors: {self.factor_names}")
        columns = [_ranks(column, name) for column, name in zip(factors.T, self.factor_names)]
        self.factor_values = tuple(values for values, _ in columns)
        self.factors_num_values = tuple(len(values) for values in self.factor_values)
        self._labels = np.stack([ranks for _, ranks in columns], axis=1)  # (N, F) int64
        self._combinations = _Groups.of(self._keys_of(self._labels))

    @property
    def size(self) -> int:
        """Number of rows N."""
        return len(self._labels)

    @property
    def is_complete(self) -> bool:
        """Whether every combination of values is there."""
        return len(self._combinations.keys) == math.prod(self.factors_num_values)

    @property
    def has_copies(self) -> bool:
        """Whether some combination has several rows."""
        return len(self._combinations.keys) < self.size

    @property
    def product_sizes(self) -> tuple[int, ...] | None:
        """``factors_num_values`` if factors are drawn one by one and looking up a row draws nothing; else None."""
        return self.factors_num_values if self.is_complete and not self.has_copies else None

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) int64 numbers of values (see ``factor_values``): per factor, or those of drawn rows."""
        if self.is_complete:
            columns = [random_state.randint(size, size=num) for size in self.factors_num_values]
            return np.stack(columns, axis=1).astype(np.int64)
        return self._labels[random_state.randint(self.size, size=num)]

    def hold_fixed(
        self, factors: np.ndarray, factor: int, values: np.ndarray | int, random_state: np.random.RandomState
    ) -> np.ndarray:
        """Draws like ``factors`` (n, F) but for one factor, which has the given values (a number, or (n,)).

        In a complete table the other factors stay; in another each row is drawn anew from those that share its value.
        """
        if self.is_complete:
            held = factors.copy()
            held[:, factor] = values
            return held
        return self._labels[self._by_value[factor].draw(np.broadcast_to(values, len(factors)), random_state)]

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Rows (n,) int64 that show the values (n, F); of several, each is as likely.

        Raises:
            MetricError: no row shows one of the combinations.
        """
        wanted = self._keys_of(factors)
        groups = self._combinations
        places = np.minimum(np.searchsorted(groups.keys, wanted), len(groups.keys) - 1)
        lacking = groups.keys[places] != wanted
        if lacking.any():
            raise MetricError(f"the table has no row with the values numbered {factors[np.argmax(lacking)].tolist()}")
        return groups.draw(places, random_state)

    @functools.cached_property
    def _bases(self) -> np.ndarray:
        """What each value's number counts in a combination's."""
        if math.prod(self.factors_num_values) >= MOST_COMBINATIONS:
            raise MetricError(
                f"factors of {self.factors_num_values} values have too many combinations: they look continuous. Cut "
                "them into bins (numpy.digitize) or leave some out."
            )
        return np.cumprod((1, *self.factors_num_values[:0:-1]), dtype=np.int64)[::-1]

    def _keys_of(self, labels: np.ndarray) -> np.ndarray:
        return labels @ self._bases

    @functools.cached_property
    def _by_value(self) -> tuple[_Groups, ...]:
        """Rows by the value of each factor."""
        return tuple(_Groups.of(column) for column in self._labels.T)


class _Groups(NamedTuple):
    """Rows in groups of equal key."""

    keys: np.ndarray  # (G,) rising
    starts: np.ndarray  # (G,) where each group starts in ``rows``
    counts: np.ndarray  # (G,) rows of each group
    rows: np.ndarray  # (N,) rows, group after group

    @classmethod
    def of(cls, keys: np.ndarray) -> _Groups:
        """Group rows by their keys (N,)."""
        found, starts, counts = np.unique(np.sort(keys), return_index=True, return_counts=True)
        return cls(found, starts, counts, np.argsort(keys, kind="stable"))

    def draw(self, places: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """A row of each of the groups at ``places`` (n,); draws nothing where every group has one row."""
        if len(self.keys) == len(self.rows):
            return self.rows[places]
        return self.rows[self.starts[places] + random_state.randint(self.counts[places])]


def _ranks(column: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a factor, rising, and the number of each row's value (N,) int64.

    Raises:
        MetricError: values that are not finite, or that never repeat.
    """
    if column.dtype == object:  # columns of several kinds: whole numbers stay so if all are
        column = np.array(column.tolist())
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        row = int(np.argmin(np.isfinite(column)))
        raise MetricError(f"{name} is {column[row]} in row {row} of the factors; every row needs a value")
    values, ranks = np.unique(column, return_inverse=True)
    if column.dtype.kind == "f" and len(values) == len(column) > 1:
        raise MetricError(
            f"{name} never has the same value twice in {len(column)} rows, so nothing can be held fixed: it looks "
            "continuous. Cut it into bins (numpy.digitize)."
        )
    return values, ranks.reshape(-1).astype(np.int64)
