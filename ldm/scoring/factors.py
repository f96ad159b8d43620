"""Where metrics draw factors from, in a form that is cheap to hand to workers: a factor space, or a stored table."""

from __future__ import annotations

import csv
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.metrics.common import FactorSampler, MetricError
from ldm.metrics.table import FactorTable
from ldm.scoring.arrays import array_source, parquet_file, repairable
from ldm.util import UserError

MAX_VALUES = 1000  # different values of a factor; more is a quantity, which metrics of discrete factors cannot take
_NAMES = ("factors", "labels", "factor_values", "latents_classes")  # what files call the table


@dataclass(frozen=True)
class Factors:
    """Factors of a data set.

    Attributes:
        names: of the factors.
        sizes: number of values of each.
        space: all combinations, row i being combination i; None for a table.
        table: ``.npy`` file of codes (N, F), row i being image i; None for a space.
        digest: tells tables apart.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    space: FactorSpace | None = None
    table: Path | None = None
    digest: int | None = None

    @classmethod
    def of_space(cls, space: FactorSpace) -> Factors:
        """All combinations of a space."""
        return cls(space.factor_names, space.factors_num_values, space)

    def sampler(self) -> FactorSampler:
        """What metrics draw from; a table is read once per process."""
        return self.space if self.space is not None else _table_sampler(self.table, self.names)


@functools.lru_cache(maxsize=2)
def _table_sampler(path: Path, names: tuple[str, ...]) -> FactorSampler:
    return FactorTable(np.load(path), names)


def factors_from_table(path: Path, num_images: int, target: Path) -> Factors:
    """Read a table of factors, one row per image, and store it as codes for the workers.

    Args:
        path: ``.npy``, ``.npz``, ``.h5``, ``.csv`` or ``.parquet``: (N, F) whole numbers, or words in tables.
        num_images: N of the latents.
        target: ``.npy`` file to write.

    Raises:
        UserError: another number of rows, or a column that holds no discrete factor.
    """
    columns = _read_columns(path)
    numbers = [
        values if values.dtype.kind in "fiub" else np.unique(values, return_inverse=True)[1].reshape(-1)
        for values in columns.values()
    ]
    codes = np.stack(numbers, axis=1)
    if len(codes) != num_images:
        raise UserError(
            f"{path} holds {len(codes)} rows, but the latents are those of {num_images} images; expected "
            "one row of factors per image, in the same order"
        )
    try:
        table = FactorTable(codes, tuple(columns))
    except MetricError as err:
        raise UserError(f"{path}: {err}") from err
    for name, size in zip(table.factor_names, table.factors_num_values):
        if size > MAX_VALUES:
            raise UserError(
                f"{path}: {name} takes {size} different values in {num_images} rows; the metrics are of discrete "
                f"factors (at most {MAX_VALUES} values): cut it into bins first, or leave the column out"
            )
    np.save(target, codes)
    digest = zlib.crc32(np.ascontiguousarray(codes).data)
    return Factors(table.factor_names, table.factors_num_values, table=target, digest=digest)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"no file {path}: expected one row of factors per image")
    with repairable(path):
        if path.suffix.lower() == ".csv":
            return _csv_columns(path)
        if path.suffix.lower() == ".parquet":
            table = parquet_file(path).read()
            return {name: table[name].to_numpy() for name in table.column_names}
        source = array_source(path, _NAMES)
        rows = np.concatenate(list(source.blocks()))
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"{path} holds an array of shape {rows.shape}; expected (images, factors)")
    return {f"factor {number}": column for number, column in enumerate(rows.T)}


def _csv_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file; its first line names them unless it holds numbers alone."""
    with path.open(newline="", encoding="utf-8") as stream:
        lines = [line for line in csv.reader(stream) if line]
    if not lines:
        raise ValueError("it is empty")
    widths = {len(line) for line in lines}
    if len(widths) > 1:
        raise ValueError(f"its lines have {min(widths)} to {max(widths)} fields")
    names: Sequence[Any] = [word.strip() for word in lines[0]]
    if all(_is_number(word) for word in names):
        names = [f"factor {number}" for number in range(len(names))]
    else:
        lines = lines[1:]
    columns = [np.array(column) for column in zip(*lines)]
    return {
        str(name): column.astype(np.float64) if _are_numbers(column) else column for name, column in zip(names, columns)
    }


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _are_numbers(column: np.ndarray) -> bool:
    return all(_is_number(word) for word in np.unique(column))
