"""Tables in CSV and Parquet files, of latents or of factors: one row per image, one column per unit or factor.

Columns that number the rows, as pandas writes them, are left out. A first line of numbers is read as names only if the
file shows that it is no row; a file that can be read in two ways is refused.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.csv_files import EXACT, UNNAMED, find_delimiter, numbers_of, read_lines
from ldm.util import UserError

logger = logging.getLogger(__name__)

BLOCK_ROWS, BLOCK_FIELDS = 10_000, 500_000  # at most read at once
FEW_ROWS = 10  # a column 0, 1, 2, ... of so few rows may be data
_INDEX = re.compile(r"index|level_\d+|__index_level_\d+__", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table in a file, of which the values have not been read."""

    path: Path
    num_rows: int
    names: list[str]  # of the columns, without index columns
    read: Callable[[int, Sequence[str]], Iterator[list[np.ndarray]]]  # (rows per block, names) -> columns by block
    words: dict[str, int] = field(default_factory=dict)  # CSV: first row with a word of each column that has words

    def values(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return whole columns by name, all if ``names`` is None: (n,), or (n, ...) for columns of lists."""
        names = self.names if names is None else names
        return {name: np.concatenate(blocks) for name, blocks in zip(names, zip(*self.read(BLOCK_ROWS, names)))}


def open_table(path: Path, label: str, num_images: int | None = None) -> Table:
    """Open a table.

    Args:
        path: ``.csv`` with commas, semicolons or tabs; or ``.parquet``.
        label: "unit" or "factor", for the names of columns without a header.
        num_images: expected number of rows, if it is known; it decides whether a first line of numbers is a header.

    Raises:
        UserError: the table is empty or malformed, two columns have the same name, or a column numbers the rows
            without being named as an index.
        ValueError, OSError: the file is damaged.
    """
    table = _open_parquet(path) if path.suffix.lower() == ".parquet" else _open_csv(path, label, num_images)
    if not table.num_rows:
        raise UserError(f"{path}: expected one row per image, got none. Write the file again.")
    twice = [name for name, count in Counter(table.names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: expected columns with different names, got {twice[0]!r} twice. Rename one of them.")
    return _without_row_numbers(table)


def _without_row_numbers(table: Table) -> Table:
    """Leave out columns that are named as an index and number the rows; refuse other columns of row numbers."""
    dropped = []
    for name in table.names:
        where, is_index, is_unnamed = f"{table.path}: column {name!r}", _INDEX.fullmatch(name), UNNAMED.fullmatch(name)
        if (is_index or is_unnamed or name == table.names[0]) and _numbers_rows(table, name):
            if is_index or is_unnamed:
                dropped.append(name)
            elif table.num_rows > FEW_ROWS and len(table.names) > 1:
                raise UserError(f"{where} numbers the rows. Remove it, or name it index, so that it is left out.")
        elif is_unnamed or is_index and len(np.unique(table.values([name])[name].astype(str))) == table.num_rows:
            raise UserError(f"{where}: expected row numbers from 0 or 1 in order. Name or remove it, or sort the rows.")
    if dropped:
        logger.info("%s: index column %s left out", table.path, ", ".join(map(repr, dropped)))
    if len(dropped) == len(table.names):
        raise UserError(f"{table.path}: expected columns of values, got only row numbers.")
    return replace(table, names=[name for name in table.names if name not in dropped])


def _numbers_rows(table: Table, name: str) -> bool:
    """Return whether a column is 0, 1, 2, ... or 1, 2, 3, ..."""
    done = first = 0
    for (values,) in table.read(BLOCK_ROWS, [name]):
        if values.ndim > 1 or values.dtype.kind not in "fiu":
            return False
        first = first if done else values[0]
        if first not in (0, 1) or not np.array_equal(values, first + np.arange(done, done + len(values))):
            return False
        done += len(values)
    return True


def _open_csv(path: Path, label: str, num_images: int | None) -> Table:
    delimiter = find_delimiter(path)
    lines = read_lines(path, delimiter)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: expected one row per image, got an empty file. Write the file again.")
    num_rows, recurs, words = 0, [False] * len(first), {}
    most_rows = max(1, min(BLOCK_ROWS, BLOCK_FIELDS // len(first)))
    for block in _batched(lines, most_rows):
        for position, column in enumerate(zip(*block)):
            recurs[position] |= first[position] in column
            if position not in words and numbers_of(column, delimiter) is None:
                found = (row for row, word in enumerate(column, num_rows) if numbers_of([word], delimiter) is None)
                words[position] = next(found, num_rows)
        num_rows += len(block)
    is_word = [not word or numbers_of([word], delimiter) is None for word in first]
    if any(is_word):
        has_header = first[0].startswith("#") or not all(itertools.compress(recurs, is_word))
    else:
        has_header = _is_header(path, first, delimiter, num_rows, num_images, all(recurs))
    if has_header:
        names = [first[0].lstrip("# "), *first[1:]]
    else:
        names, num_rows = [f"{label} {position}" for position in range(len(first))], num_rows + 1
        words = {position: row + 1 for position, row in words.items()}
        words |= {position: 0 for position, word in enumerate(first) if numbers_of([word], delimiter) is None}

    def read(size: int, chosen: Sequence[str]) -> Iterator[list[np.ndarray]]:
        places = {name: position for position, name in enumerate(names)}
        positions = [places[name] for name in chosen]
        for block in _batched(
            itertools.islice(read_lines(path, delimiter), int(has_header), None), min(size, most_rows)
        ):
            columns = ((position, [fields[position] for fields in block]) for position in positions)
            yield [np.array(column) if at in words else numbers_of(column, delimiter) for at, column in columns]

    return Table(path, num_rows, names, read, {names[position]: row for position, row in words.items()})


def _batched(rows: Iterator[list[str]], size: int) -> Iterator[list[list[str]]]:
    while block := list(itertools.islice(rows, size)):
        yield block


def _is_header(
    path: Path, first: list[str], delimiter: str, num_rows: int, num_images: int | None, recurs: bool
) -> bool:
    """Return whether a first line of numbers has names: 0 to K-1 or 1 to K, which are not the values of a row.

    There are ``num_rows`` lines below it, of ``num_images`` rows if that is known; ``recurs`` is whether each of its
    numbers is also below it in its column.

    Raises:
        UserError: it cannot be decided.
    """
    is_numbered = first in ([str(number + start) for number in range(len(first))] for start in (0, 1))
    if not is_numbered or not num_rows:
        return False
    found = num_images == num_rows if num_images in (num_rows, num_rows + 1) else not recurs
    if recurs and num_images not in (num_rows, num_rows + 1):  # a complete set of combinations shows it
        below = Counter(map(tuple, itertools.islice(read_lines(path, delimiter), 1, None)))
        found = _is_complete(below)
        if not found and not _is_complete(below + Counter([tuple(first)])):
            names = ", ".join(first)
            raise UserError(f"{path}, line 1: {names} may be names of columns or a row of values. Use words as names.")
    if found:
        logger.info("%s: line 1 (%s) read as names of the columns", path, ", ".join(first))
    return found


def _is_complete(combinations: Counter[tuple[str, ...]]) -> bool:
    """Return whether every combination of values has the same number of rows."""
    sizes = [len(set(column)) for column in zip(*combinations)]
    return len(set(combinations.values())) == 1 and len(combinations) == math.prod(sizes)


def _open_parquet(path: Path) -> Table:
    file = _parquet_file(path)
    names, stored = file.schema_arrow.names, file.schema_arrow.metadata or {}
    pandas = json.loads(stored.get(b"pandas", b"{}"))
    index = [name for name in pandas.get("index_columns", []) if name in names]
    if index:
        logger.info("%s: index of a data frame left out (%s)", path, ", ".join(index))

    def read(size: int, chosen: Sequence[str]) -> Iterator[list[np.ndarray]]:
        start = 0
        for batch in _parquet_file(path).iter_batches(batch_size=min(size, BLOCK_ROWS), columns=list(chosen)):
            yield [_arrow_values(path, name, batch.column(name), start) for name in chosen]
            start += batch.num_rows

    columns = [name for name in names if name not in index]
    if not columns:
        raise UserError(f"{path}: expected columns of values, got {'the index' if index else 'none'} only.")
    return Table(path, file.metadata.num_rows, columns, read)


def _parquet_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        UserError: pyarrow is not installed.
        ValueError: the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install -e .[parquet]") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error


def _arrow_values(path: Path, name: str, column: Any, start: int) -> np.ndarray:
    """Return the values of a column of Arrow: (n,); for lists of equal lengths (n, D), for lists of lists (n, U, D).

    Raises:
        UserError: lists are empty, missing, of different lengths, or have missing values.
    """
    import pyarrow.compute
    from pyarrow import types

    shape = [len(column)]
    while types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        lengths = pyarrow.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        column = column.flatten()
        is_null = column.is_null().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
        if len(wrong) or is_null.any():
            found = f"{lengths[wrong[0]]} values" if len(wrong) else "a missing value"
            inner = wrong[0] if len(wrong) else np.argmax(is_null) // lengths[0]
            row = start + int(inner) // math.prod(shape[1:])
            raise UserError(
                f"{path}: column {name!r}: expected lists of equal length in every row, got {found} in row {row}."
            )
        shape.append(int(lengths[0]))
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_decimal(column.type):
        column = column.cast(pyarrow.float64())
    if types.is_integer(column.type) and column.null_count:  # NumPy gives float64, which may round long identifiers
        bounds = pyarrow.compute.min_max(column).as_py().values()
        if any(abs(bound or 0) > EXACT for bound in bounds):
            return np.array(column.to_pylist(), dtype=object).reshape(shape)
    return column.to_numpy(zero_copy_only=False).reshape(shape)
