"""Columns of a table of factors: distinct values, and the index of the value of each row."""

from __future__ import annotations

import numpy as np

from ldm.csv_files import MISSING_WORDS
from ldm.metrics.common import MetricError

MISSING = -1  # index of rows without a value
SIMPLE = "biufUSMm"  # kinds of arrays whose values are compared: numbers, texts, dates
FEW_VALUES = 10  # columns with fewer values are never taken for quantities or row numbers


def value_indices(column: np.ndarray, name: str, is_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of a factor, ascending, and the index of the value of each row, (N,) int64.

    Rows without a value (None, NaN, or a text of ``MISSING_WORDS``) have the index ``MISSING``.

    Args:
        column: (N,) numbers, texts or objects.
        name: name of the factor, for messages.
        is_only: whether the table has no other column.

    Raises:
        MetricError: a value is infinite or neither number nor text, texts are mixed with numbers, there is no value, or
            most rows have a value of their own, as quantities and row numbers do.
    """
    column = np.char.decode(column, errors="backslashreplace") if column.dtype.kind == "S" else column
    is_missing = _without_value(column)
    known = column[~is_missing]
    if known.dtype == object and len(known):  # a table of several types: find that of the column
        known = _of_one_type(known, np.flatnonzero(~is_missing), name)
    if not len(known):
        raise MetricError(f"factors: expected values for {name}, but all {len(column)} rows are empty. Leave it out.")
    if known.dtype.kind not in SIMPLE:
        raise MetricError(f"factors: expected numbers or texts, got values of type {known.dtype} for {name}.")
    if known.dtype.kind == "f" and not np.isfinite(known).all():
        row = int(np.flatnonzero(~is_missing)[np.argmin(np.isfinite(known))])
        raise MetricError(f"factors: expected finite values, got {column[row]} for {name} in row {row}.")
    values, indices = np.unique(known, return_inverse=True)
    _check_repeated(values, len(known), name, is_only)
    ranks = np.full(len(column), MISSING, dtype=np.int64)
    ranks[~is_missing] = indices.reshape(-1)
    return values, ranks


def _without_value(column: np.ndarray) -> np.ndarray:
    """Return which rows have no value, (N,) bool."""
    if column.dtype == object:
        return np.array([value is None or str(value).strip() in MISSING_WORDS for value in column], dtype=bool)
    if column.dtype.kind == "f":
        return np.isnan(column)
    if column.dtype.kind in "Mm":
        return np.isnat(column)
    is_text = column.dtype.kind == "U"
    return np.isin(np.char.strip(column), list(MISSING_WORDS)) if is_text else np.zeros(len(column), dtype=bool)


def _of_one_type(known: np.ndarray, rows: np.ndarray, name: str) -> np.ndarray:
    """Return objects (n,) as numbers, texts or dates; ``rows`` (n,) are their rows, for messages."""
    kinds = np.array([np.asarray(value).dtype.kind if np.ndim(value) == 0 else "O" for value in known])
    is_text, is_simple = np.isin(kinds, ["U", "S"]), np.isin(kinds, list(SIMPLE))
    if not is_simple.all():
        wrong = int(np.argmin(is_simple))
        raise MetricError(f"factors: expected a number or text for {name}, got {known[wrong]!r} in row {rows[wrong]}.")
    if is_text.any() and not is_text.all():
        number, text = int(np.argmin(is_text)), int(np.argmax(is_text))
        raise MetricError(
            f"factors: expected numbers or texts for {name}, got {known[number]!r} in row {rows[number]} and "
            f"{known[text]!r} in row {rows[text]}. Write all values in one way."
        )
    return np.array(known.tolist())


def _check_repeated(values: np.ndarray, num_rows: int, name: str, is_only: bool) -> None:
    """Raise if the values of a factor occur less than twice on average."""
    is_quantity = values.dtype.kind == "f" and len(values) == num_rows > 1 and (values % 1 != 0).any()
    if not is_quantity and (is_only or len(values) <= max(FEW_VALUES, num_rows / 2)):
        return
    if values.dtype.kind == "f" and (values % 1 != 0).any():
        kind, remedy = "looks continuous", f"Divide it into bins (--bins {name}=10; discretize)"
    else:
        kind, remedy = "looks like a number or name of each image", "Leave the column out"
    raise MetricError(f"factors: {name} has {len(values)} values in {num_rows} rows and {kind}. {remedy}.")
