"""Tables in CSV and Parquet files, of latents or of factors: one row per image, one column per unit or factor.

Columns that number the rows, as pandas writes them, are left out. A first line of numbers is read as names only if the
file shows that it is no row; a file that can be read in two ways is refused.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ldm.metrics.inputs import MISSING_WORDS
from ldm.util import UserError

logger = logging.getLogger(__name__)

DELIMITERS = "\t;,"
BLOCK_ROWS = 10_000  # read at once
SAMPLE_LINES = 50  # lines from which the delimiter is found
FEW_ROWS = 10  # a column 0, 1, 2, ... of so few rows may be data
_UNNAMED = re.compile(r"(unnamed: \d+(\.\d+)*)?", re.IGNORECASE)
_INDEX = re.compile(r"index|level_\d+|__index_level_\d+__", re.IGNORECASE)
_DECIMAL = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")


@dataclass(frozen=True)
class Table:
    """A table in a file, of which the values have not been read."""

    path: Path
    num_rows: int
    columns: dict[str, int]  # name -> position in the file; index columns are left out
    read: Callable[[int, Sequence[int]], Iterator[list[np.ndarray]]]  # (rows per block, positions) -> blocks

    def blocks(self, num_rows: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns of each block of at most ``num_rows`` rows: (n,), or (n, ...) for columns of lists."""
        for block in self.read(num_rows, list(self.columns.values())):
            yield dict(zip(self.columns, block))

    def column(self, name: str) -> np.ndarray:
        """Return a whole column."""
        blocks = self.read(BLOCK_ROWS, [self.columns[name]])
        return np.concatenate([column for (column,) in blocks])

    def values(self) -> dict[str, np.ndarray]:
        """Return the whole columns."""
        blocks = list(self.blocks(BLOCK_ROWS))
        return {name: np.concatenate([block[name] for block in blocks]) for name in self.columns}


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
    table, names = (_open_parquet if path.suffix.lower() == ".parquet" else _open_csv)(path, label, num_images)
    if not table.num_rows:
        raise UserError(f"{path}: expected one row per image, got none. Write the file again.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: expected columns with different names, got {twice[0]!r} twice. Rename one of them.")
    return _without_row_numbers(table)


def _without_row_numbers(table: Table) -> Table:
    """Leave out columns that are named as an index and number the rows; refuse other columns of row numbers."""
    dropped = []
    for position, name in enumerate(table.columns):
        where, is_index, is_unnamed = f"{table.path}: column {name!r}", _INDEX.fullmatch(name), _UNNAMED.fullmatch(name)
        if not (is_index or is_unnamed or position == 0):
            continue
        if _numbers_rows(table, name):
            if is_index or is_unnamed:
                dropped.append(name)
            elif table.num_rows > FEW_ROWS and len(table.columns) > 1:
                raise UserError(f"{where} numbers the rows. Remove it, or name it index, so that it is left out.")
        elif is_unnamed:
            raise UserError(f"{where}: expected a name, or row numbers from 0 or 1. Name the column or remove it.")
        elif is_index and len(np.unique(table.column(name).astype(str))) == table.num_rows > 1:
            raise UserError(f"{where}: expected row numbers in order. Sort the rows like the other file, or remove it.")
    if dropped:
        logger.info("%s: index column %s left out", table.path, ", ".join(map(repr, dropped)))
    kept = {name: position for name, position in table.columns.items() if name not in dropped}
    if not kept:
        raise UserError(f"{table.path}: expected columns of values, got only row numbers.")
    return replace(table, columns=kept)


def _numbers_rows(table: Table, name: str) -> bool:
    """Return whether a column is 0, 1, 2, ... or 1, 2, 3, ..."""
    done, first = 0, 0
    for block in replace(table, columns={name: table.columns[name]}).blocks(BLOCK_ROWS):
        values = block[name]
        if values.ndim > 1 or values.dtype.kind not in "fiu":
            return False
        first = first if done else values[0]
        if first not in (0, 1) or not np.array_equal(values, first + np.arange(done, done + len(values))):
            return False
        done += len(values)
    return True


def is_number(word: str) -> bool:
    """Return whether a field is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _open_csv(path: Path, label: str, num_images: int | None) -> tuple[Table, list[str]]:
    delimiter = _delimiter(path)

    def rows() -> Iterator[list[str]]:
        return itertools.islice(_lines(path, delimiter), int(has_header), None)

    first = next(_lines(path, delimiter), None)
    if first is None:
        raise UserError(f"{path}: expected one row per image, got an empty file. Write the file again.")
    has_header = True
    has_header = first[0].startswith("#") or _is_header(path, first, rows, num_images, delimiter)
    first[0] = first[0].lstrip("# ")
    names = first if has_header else [f"{label} {position}" for position in range(len(first))]
    is_numeric, num_rows = [True] * len(names), 0
    for block in _batched(rows(), BLOCK_ROWS):
        num_rows += len(block)
        for position, words in enumerate(zip(*block)):
            is_numeric[position] = is_numeric[position] and _numbers(words, delimiter) is not None

    def read(size: int, positions: Sequence[int]) -> Iterator[list[np.ndarray]]:
        for block in _batched(rows(), size):
            words = [[fields[position] for fields in block] for position in positions]
            yield [
                _numbers(column, delimiter) if is_numeric[position] else np.array(column)
                for position, column in zip(positions, words)
            ]

    return Table(path, num_rows, {name: position for position, name in enumerate(names)}, read), names


def _delimiter(path: Path) -> str:
    """Return the delimiter that divides all first lines into the same number of fields.

    Raises:
        UserError: two delimiters do, and the fields show that neither is a decimal comma.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        sample = [line for line in itertools.islice(stream, SAMPLE_LINES) if line.strip()]
    try:
        fields = {delimiter: list(csv.reader(sample, delimiter=delimiter)) for delimiter in DELIMITERS}
    except csv.Error as error:
        raise ValueError(error) from error
    widths = {delimiter: {len(line) for line in lines} for delimiter, lines in fields.items() if lines}
    fitting = [delimiter for delimiter, found in widths.items() if len(found) == 1 and found != {1}]
    if not fitting:  # lines of one field, or of different numbers of fields
        return max(",;\t", key=lambda delimiter: len(fields[delimiter][0]) if sample else 0)
    for word in itertools.chain(*fields[fitting[0]][1:]):
        if any(delimiter in word for delimiter in fitting[1:]) and not _DECIMAL.fullmatch(word):
            raise UserError(
                f"{path}: {' and '.join(map(repr, fitting))} both divide the lines into equal numbers of fields. Write "
                "the file with one of them."
            )
    return fitting[0]


def _lines(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of every line that is not blank.

    Raises:
        UserError: a line has another number of fields than the first, or is malformed.
    """
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True, strict=True)
        width = 0
        try:
            for fields in filter(None, reader):
                width = width or len(fields)
                if len(fields) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {width} fields as in the first line, got "
                        f"{len(fields)}. Complete the line, or quote fields that contain {delimiter!r}."
                    )
                yield [field.strip() for field in fields]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}, line {reader.line_num + 1}: expected text in UTF-8 with complete quotes ({error}). "
                "Write the file again."
            ) from error


def _is_header(path: Path, first: list[str], rows: Callable, num_images: int | None, delimiter: str) -> bool:
    """Return whether the first line has names: words that are no values, or numbers 0 to K-1 that are no row.

    Raises:
        UserError: it cannot be decided.
    """
    is_word = [not word or _numbers([word], delimiter) is None for word in first]
    is_numbered = first in ([str(start + number) for number in range(len(first))] for start in (0, 1))
    if not any(is_word) and not is_numbered:
        return False
    recurs, num_rows = np.zeros(len(first), dtype=bool), 0
    for fields in rows():
        recurs |= [word == name for word, name in zip(fields, first)]
        num_rows += 1
    if any(is_word):
        return not recurs[is_word].all()
    found = num_images == num_rows if num_images in (num_rows, num_rows + 1) else None
    if found is None and not recurs.all():
        found = True
    if found is None:
        combinations = Counter(map(tuple, rows()))
        if _is_complete(combinations) or _is_complete(combinations + Counter([tuple(first)])):
            found = _is_complete(combinations)
    if found is None:
        raise UserError(
            f"{path}, line 1: {', '.join(first)} may be names of columns or a row of values. Use words as names."
        )
    if found:
        logger.info("%s: line 1 (%s) read as names of the columns", path, ", ".join(first))
    return found


def _is_complete(combinations: Counter[tuple[str, ...]]) -> bool:
    """Return whether every combination of values has the same number of rows."""
    sizes = [len(set(column)) for column in zip(*combinations)]
    return len(set(combinations.values())) == 1 and len(combinations) == math.prod(sizes)


def _batched(rows: Iterator[list[str]], size: int) -> Iterator[list[list[str]]]:
    while block := list(itertools.islice(rows, size)):
        yield block


def _numbers(words: Sequence[str], delimiter: str) -> np.ndarray | None:
    """Return the numbers in a column, NaN for fields without a value; None if it contains words."""
    column = np.array(words)
    if delimiter != ",":
        column = np.char.replace(column, ",", ".")
    try:
        return column.astype(np.float64)
    except ValueError:
        column = np.where(np.isin(column, MISSING_WORDS), "nan", column)
    try:
        return column.astype(np.float64)
    except ValueError:
        return None


def _open_parquet(path: Path, label: str, num_images: int | None) -> tuple[Table, list[str]]:
    file = _parquet_file(path)
    names, stored = file.schema_arrow.names, file.schema_arrow.metadata or {}
    pandas = json.loads(stored.get(b"pandas", b"{}"))
    index = [name for name in pandas.get("index_columns", []) if name in names]
    if index:
        logger.info("%s: index of a data frame left out (%s)", path, ", ".join(index))

    def read(size: int, positions: Sequence[int]) -> Iterator[list[np.ndarray]]:
        start, chosen = 0, [names[position] for position in positions]
        for batch in _parquet_file(path).iter_batches(batch_size=size, columns=chosen):
            yield [_arrow_values(path, name, batch.column(name), start) for name in chosen]
            start += batch.num_rows

    columns = {name: position for position, name in enumerate(names) if name not in index}
    if not columns:
        raise UserError(f"{path}: expected columns of values, got {'the index' if index else 'none'} only.")
    return Table(path, file.metadata.num_rows, columns, read), names


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
        UserError: lists are empty, missing or of different lengths, or the type is not supported.
    """
    import pyarrow.compute
    from pyarrow import types

    shape, where = [len(column)], f"{path}: column {name!r}"

    def refuse(row: int, found: str) -> NoReturn:
        row = start + row // math.prod(shape[1:])
        raise UserError(f"{where}: expected lists of equal length in every row, got {found} in row {row}.")

    is_list = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    while any(check(column.type) for check in is_list):
        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(~(lengths == lengths[0]) | ~(lengths > 0))
        if len(odd):
            refuse(int(odd[0]), "none" if np.isnan(lengths[odd[0]]) else f"{lengths[odd[0]]:.0f} values")
        column = column.flatten()
        shape.append(int(lengths[0]))
        if column.null_count:
            refuse(int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), "a missing value")
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_decimal(column.type):
        column = column.cast(pyarrow.float64())
    simple = ("integer", "floating", "boolean", "string", "large_string", "date", "timestamp", "null")
    if not any(vars(types)[f"is_{kind}"](column.type) for kind in simple):
        raise UserError(f"{where}: expected numbers or words, got values of type {column.type}. Convert the column.")
    return column.to_numpy(zero_copy_only=False).reshape(shape)
