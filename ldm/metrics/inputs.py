"""Arrays from the values that users pass: tensors, data frames, lists, masked and structured arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ldm.metrics.common import MetricError


@runtime_checkable
class Tensor(Protocol):
    """A tensor of torch, which this package does not import."""

    def detach(self) -> Any: ...

    def cpu(self) -> Any: ...


@runtime_checkable
class DataFrame(Protocol):
    """A data frame, of pandas or polars."""

    columns: Iterable[Any]  # their names

    def __getitem__(self, name: Any) -> Any: ...


def as_array(values: Any) -> np.ndarray:
    """Return an array: of a tensor also in bfloat16 or with a gradient, of lists with a type per entry if they differ.

    Raises:
        MetricError: rows have different lengths.
    """
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        try:
            with contextlib.suppress(TypeError):
                return tensor.numpy()
            return tensor.float().numpy()  # of a type that NumPy does not have, such as bfloat16
        except (TypeError, RuntimeError) as error:  # a sparse tensor, or a view
            raise MetricError(f"expected a dense tensor, got {' '.join(str(error).split())}") from error
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, (list, tuple)):
        values = [as_array(row) if isinstance(row, Tensor) else row for row in values]
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths, or lists as entries
        return _of_rows(values)
    is_mixed = isinstance(values, list) and array.dtype.kind in "US"
    return np.array(values, dtype=object) if is_mixed else array  # numbers beside texts remain numbers


def _of_rows(rows: Any) -> np.ndarray:
    """Return an array of objects (N, K)."""
    rows = [row if isinstance(row, (list, tuple, np.ndarray)) else [row] for row in rows]
    array = np.empty((len(rows), len(rows[0])), dtype=object)
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise MetricError(
                f"expected rows of equal length, got {len(row)} values in row {number} and {len(rows[0])} in row 0."
            )
        for column, value in enumerate(row):
            array[number, column] = value
    return array


def as_latents(values: Any) -> np.ndarray:
    """Return latents as an array of numbers, which is not copied if it is one.

    Raises:
        MetricError: an entry is not a number; the message names its row and column.
    """
    array = as_array(values)
    if array.dtype.names:
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
    if np.ma.is_masked(array):
        raise MetricError(
            f"latents: expected a value everywhere, got a masked one in {_place(np.ma.getmaskarray(array))}."
        )
    if array.ndim == 0:
        raise MetricError(f"latents: expected an array (N, K) or (N, U, D), got {type(values).__name__}.")
    if array.dtype.kind in "OUS":
        numeric = np.vectorize(lambda value: isinstance(value, (Real, np.bool_)), otypes=[bool])(array)
        if not numeric.all():
            place = np.unravel_index(np.argmin(numeric), numeric.shape)
            raise MetricError(f"latents: expected real numbers, got {array[place]!r} in {_place(~numeric)}.")
        array = array.astype(np.float64)
    return np.asarray(array)


def _place(wrong: np.ndarray) -> str:
    """Return row and column of the first wrong entry."""
    place = np.argwhere(wrong)[0].tolist()
    return ", ".join(f"{axis} {number}" for axis, number in zip(("row", "column", "entry"), place))


def as_columns(factors: Any) -> tuple[list[str], list[np.ndarray]]:
    """Return names and values (N,) of the columns of a table.

    Args:
        factors: (N, F) numbers, texts or objects, as an array (may be masked), tensor, lists or a data frame, whose
            index is ignored; a structured array, or ``{name: column}``.

    Raises:
        MetricError: there are not two axes, or two columns have the same name.
    """
    if not isinstance(factors, (Mapping, DataFrame)):
        factors = as_array(factors)
        if factors.dtype.names:
            factors = {name: factors[name] for name in factors.dtype.names}
    if isinstance(factors, (Mapping, DataFrame)):
        keys = list(factors if isinstance(factors, Mapping) else factors.columns)
        if len(set(keys)) < len(keys):
            raise MetricError(f"factors: expected columns with different names, got {', '.join(map(str, keys))}.")
        names, columns = list(map(str, keys)), [_column(factors[key]) for key in keys]
        shape = (len(columns[0]) if columns else 0, len(columns))
        is_table = len({column.shape for column in columns}) == 1 and columns[0].ndim == 1
    else:
        shape, is_table = factors.shape, factors.ndim == 2
        names = [f"factor {number}" for number in range(shape[-1] if is_table else 0)]
        columns = [_column(column) for column in factors.T] if is_table else []
    if not is_table or 0 in shape:
        raise MetricError(f"factors: expected shape (N, F), a row per image and a column per factor; got {shape}.")
    return names, columns


def _column(values: Any) -> np.ndarray:
    """Return one column; masked values become None."""
    column = as_array(values)
    if isinstance(column, np.ma.MaskedArray):
        mask, column = np.ma.getmaskarray(column), np.array(column.data)
        if mask.any():
            column = column.astype(object)
            column[mask] = None
    return column
