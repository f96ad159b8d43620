"""Sampler for data sets whose factor values are in a table, one row per image.

A table that contains every combination of values is sampled as in disentanglement_lib: factor by factor, then a row
with these values, at random if there are several. With one row per combination the draws are those of a
``FactorSpace``. If combinations are missing, *rows* are drawn with the same probability; where a metric fixes the value
of a factor, it draws from the rows with that value. Such scores are comparable only for the same table.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.metrics.common import MetricError
from ldm.metrics.inputs import as_columns
from ldm.metrics.sampling.columns import MISSING, value_indices

logger = logging.getLogger(__name__)

MOST_COMBINATIONS = 2**62  # more are not numbered in int64
MOST_FACTORS = 1024
MOST_DRAWS = 20  # bootstrap samples drawn until one has at least two values of every factor


class FactorTable:
    """Factor values of each row of a data set.

    A factor that has the same value in all rows is left out, with a warning: it would lower FactorVAE, and other
    metrics are not defined for it.

    Args:
        factors: (N, F) integers, strings or floats (equal ones are one value): an array, a tensor, lists, a data frame
            (its index is ignored), or ``{name: column}``; see ``ldm.metrics.inputs``.
        names: names of the F factors; None takes the column names of a data frame, or numbers.
        missing: "error", or "drop" to leave out rows in which a factor has no value (None, NaN, "", a masked entry).

    Attributes:
        factor_names: names of the F factors that vary.
        factor_values: the distinct values of each, ascending; ``factors_num_values``: how many.
        size: number of rows N, rows that are left out included.
        num_left_out: number of rows without a value.

    Raises:
        MetricError: there are not two axes, no rows, values that are missing or not finite, no factor that varies, or a
            column that looks continuous or like row numbers.

    Example:
        >>> table = FactorTable([["red", 3], ["red", 5], ["blue", 3]])
        >>> table.factors_num_values, table.is_complete
        ((2, 2), False)
    """

    def __init__(self, factors: Any, names: Sequence[str] | None = None, missing: str = "error") -> None:
        found, columns = as_columns(factors)
        self.size, num_columns = len(columns[0]), len(columns)
        if num_columns > MOST_FACTORS:
            raise MetricError(
                f"factors: expected at most {MOST_FACTORS} columns, got shape {(self.size, num_columns)}. If the "
                "images are in the columns, pass factors.T."
            )
        names = tuple(map(str, found if names is None else names))
        if len(names) != num_columns:
            raise MetricError(f"names: expected {num_columns}, one per factor; got {names}.")
        columns = [value_indices(column, name, num_columns == 1) for column, name in zip(columns, names)]
        self._rows = _rows_with_values(np.stack([ranks for _, ranks in columns], axis=1), names, missing)
        self.num_left_out = self.size - len(self._rows)
        kept = [value_indices(values[ranks[self._rows]], name, True) for (values, ranks), name in zip(columns, names)]
        varying = _varying(names, [len(values) for values, _ in kept])
        self._labels = np.stack([kept[number][1] for number in varying], axis=1)  # (N', F) int64
        self._set_factors([names[number] for number in varying], [kept[number][0] for number in varying])

    def _set_factors(self, names: Sequence[str], values: Sequence[np.ndarray]) -> None:
        self.factor_names, self.factor_values = tuple(names), tuple(values)
        self.num_factors, self.factors_num_values = len(self.factor_values), tuple(map(len, self.factor_values))

    def save(self, path: Path) -> None:
        """Write the table to an ``.npz`` file, which other processes read by ``load``."""
        arrays: dict[str, Any] = {f"values_{number}": values for number, values in enumerate(self.factor_values)}
        arrays |= {"size": self.size, "rows": self._rows, "labels": self._labels, "names": self.factor_names}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> FactorTable:
        """Read a file of ``save``; nothing is unpickled."""
        table = cls.__new__(cls)
        with np.load(path, allow_pickle=False) as stored:
            table.size, table._rows, table._labels = int(stored["size"]), stored["rows"], stored["labels"]
            names = stored["names"].tolist()
            table._set_factors(names, [stored[f"values_{number}"] for number in range(len(names))])
        table.num_left_out = table.size - len(table._rows)
        return table

    @property
    def is_complete(self) -> bool:
        """Whether the table contains every combination of values."""
        return len(self._combinations.keys) == math.prod(self.factors_num_values)

    @property
    def has_copies(self) -> bool:
        """Whether a combination has several rows."""
        return len(self._combinations.keys) < len(self._labels)

    @property
    def product_sizes(self) -> tuple[int, ...] | None:
        """``factors_num_values`` if factors are independent and each combination has one row; else None."""
        return self.factors_num_values if self.is_complete and not self.has_copies else None

    def split(self, random_state: np.random.RandomState) -> tuple[FactorTable, FactorTable]:
        """Return samplers of training and test rows, which are disjoint halves of the rows.

        A complete table with one row per combination is returned twice: published protocols draw training and test
        codes from the same images of such a data set. Rows with the same values are distributed evenly.
        """
        if self.product_sizes is not None:
            return self, self
        rows, positions = np.unique(self._rows, return_index=True)  # a bootstrap sample has some rows several times
        order = random_state.permutation(len(rows))
        order = order[np.argsort(self._numbers(self._labels[positions[order]]), kind="stable")]
        coins = random_state.randint(2, size=(len(rows) + 1) // 2)  # which of two neighbours is a training row
        is_training = np.isin(self._rows, rows[order[np.stack([coins, 1 - coins], axis=1).ravel()[: len(rows)] == 1]])
        return self._part(np.flatnonzero(is_training)), self._part(np.flatnonzero(~is_training))

    def bootstrap(self, random_state: np.random.RandomState) -> FactorTable:
        """Return a table of as many rows, drawn with replacement; from equal combinations if the table is complete.

        A complete table with one row per combination is returned itself.

        Raises:
            MetricError: a factor is constant in each of ``MOST_DRAWS`` samples.
        """
        if self.product_sizes is not None:
            return self
        groups, count = self._combinations, len(self._labels)
        own = np.searchsorted(groups.keys, self._numbers(self._labels))  # combination of each row
        for _ in range(MOST_DRAWS):
            drawn = groups.draw(own, random_state) if self.is_complete else random_state.randint(count, size=count)
            sample = self._part(np.sort(drawn))
            is_constant = (sample._labels == sample._labels[0]).all(axis=0)
            if not is_constant.any():
                return sample
        name = self.factor_names[int(np.argmax(is_constant))]
        raise MetricError(f"bootstrap: {name} is constant in samples of the {count} rows. Leave the factor out.")

    def _part(self, positions: np.ndarray) -> FactorTable:
        """Return the table of some of the rows, with the same values."""
        part = copy.copy(self)
        for name in ("_combinations", "_by_value"):
            part.__dict__.pop(name, None)
        part._rows, part._labels = self._rows[positions], self._labels[positions]
        return part

    def sample_factors(self, num: int, random_state: np.random.RandomState) -> np.ndarray:
        """Draw (num, F) int64, indices into ``factor_values``: per factor, or those of drawn rows."""
        if self.is_complete:
            columns = [random_state.randint(size, size=num) for size in self.factors_num_values]
            return np.stack(columns, axis=1).astype(np.int64)
        return self._labels[random_state.randint(len(self._labels), size=num)]

    def hold_fixed(
        self, factors: np.ndarray, factor: int, values: np.ndarray | int, random_state: np.random.RandomState
    ) -> np.ndarray:
        """Return draws like ``factors`` (n, F) that have the given values (a number, or (n,)) in one factor.

        In a complete table the other factors are kept; otherwise each row is redrawn from those with its value.
        """
        if self.is_complete:
            return np.where(np.arange(self.num_factors) == factor, np.reshape(values, (-1, 1)), factors)
        groups = self._by_value[factor]
        wanted = np.searchsorted(groups.keys, np.broadcast_to(values, len(factors)))
        return self._labels[groups.draw(wanted, random_state)]

    def sample_observations_from_factors(self, factors: np.ndarray, random_state: np.random.RandomState) -> np.ndarray:
        """Return rows (n,) int64 with the values (n, F), each of several with the same probability.

        Raises:
            MetricError: a combination has no row.
        """
        wanted, groups = self._numbers(factors), self._combinations
        indices = np.minimum(np.searchsorted(groups.keys, wanted), len(groups.keys) - 1)
        missing = groups.keys[indices] != wanted
        if missing.any():
            raise MetricError(f"the table has no row with the value indices {factors[np.argmax(missing)].tolist()}.")
        return self._rows[groups.draw(indices, random_state)]

    def _numbers(self, factors: np.ndarray) -> np.ndarray:
        """Return a key of each combination (n, F): its number, or its bytes if there are too many combinations."""
        sizes = self.factors_num_values
        if math.prod(sizes) >= MOST_COMBINATIONS:
            return np.ascontiguousarray(factors, dtype=np.uint32).view(f"S{4 * len(sizes)}")[:, 0]
        return factors @ np.cumprod((1, *sizes[:0:-1]), dtype=np.int64)[::-1]

    @functools.cached_property
    def _combinations(self) -> _Groups:
        return _Groups.of(self._numbers(self._labels))

    @functools.cached_property
    def _by_value(self) -> tuple[_Groups, ...]:
        return tuple(_Groups.of(column) for column in self._labels.T)


def _rows_with_values(ranks: np.ndarray, names: Sequence[str], missing: str) -> np.ndarray:
    """Return the rows in which every factor has a value, from the indices of values (N, F)."""
    if missing not in ("error", "drop"):
        raise MetricError(f"missing: expected error or drop, got {missing!r}.")
    is_missing = ranks == MISSING
    if is_missing.any() and missing == "error":
        row, column = np.argwhere(is_missing)[0]
        count = np.count_nonzero(is_missing.any(axis=1))
        raise MetricError(
            f"factors: expected a value in every row, got none for {names[column]} in row {row} ({count} of "
            f'{len(ranks)} rows lack a value). Leave these rows out (missing="drop", --missing drop), or the column.'
        )
    rows = np.flatnonzero(~is_missing.any(axis=1))
    if not len(rows):
        raise MetricError(f"factors: no row has a value of every factor ({', '.join(names)}). Leave a column out.")
    return rows


def _varying(names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Return the numbers of the factors that vary; log a warning about the others.

    Raises:
        MetricError: no factor varies.
    """
    constant = [name for name, size in zip(names, sizes) if size == 1]
    if len(constant) == len(sizes):
        raise MetricError(f"factors: expected factors that vary, but each of {', '.join(names)} has a single value.")
    if constant:
        logger.warning("factors: %s left out, with a single value in all rows", ", ".join(constant))
    return [number for number, size in enumerate(sizes) if size > 1]


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
