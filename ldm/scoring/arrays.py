"""Arrays in .npz, .npy, .h5, .parquet and .csv files, read without loading them whole.

``.npy`` files and members of uncompressed ``.npz`` files are memory-mapped. Other binary files are converted once to a
``.npy`` file, in blocks of rows, which is then memory-mapped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.rows import array_header, map_stored_member
from ldm.errors import reason_of
from ldm.runs.disk import is_full
from ldm.scoring.tables import Table, open_table
from ldm.util import UserError

BLOCK_BYTES = 32_000_000  # read at once
CONVERTED = "latents.npy"  # converted copy of a file that cannot be memory-mapped
LATENTS = ("latents", "codes", "representations", "embeddings", "z")  # accepted names of the array, best first


class IncompleteFile(UserError):
    """A file is damaged or still being written."""


@dataclass(frozen=True)
class ArraySource:
    """An array in a file, of which only the header has been read."""

    path: Path
    shape: tuple[int, ...]  # the first axis counts images
    dtype: np.dtype
    open_mapped: Callable[[], np.ndarray] | None  # memory-maps the array; None if the file format does not allow it
    write: Callable[[Path], None] | None = None  # writes the array to a .npy file


def array_source(path: Path, names: Sequence[str] = LATENTS, kinds: str = "fiub") -> ArraySource:
    """Read the header of a file.

    Args:
        path: ``.npz``, ``.npy``, ``.h5``/``.hdf5``, ``.parquet`` or ``.csv``. Columns of a table are units; columns
            that hold lists are vectors per unit.
        names: names of the array in files that hold several arrays, best first. An array of another name is accepted
            if it is the only one.
        kinds: accepted kinds of the values, as in ``numpy.dtype.kind``.

    Raises:
        IncompleteFile: the file is damaged or incomplete.
        UserError: the file does not exist, has an unsupported format, or does not hold an array of numbers.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected {', '.join(_READERS)}, got {path.suffix or 'no file extension'}")
    with incomplete_if_unreadable(path):
        source = reader(path, names)
    if source.dtype.hasobject:
        raise UserError(f"{path}: expected numbers, got Python objects, which are not unpickled. Convert the array.")
    if source.dtype.kind not in kinds:
        raise UserError(f"{path}: expected numbers, got values of type {source.dtype}. Convert them to numbers.")
    return source


def open_array(source: ArraySource, folder: Path) -> np.ndarray:
    """Return the array memory-mapped: from its own file, or from a copy that is made once in ``folder``.

    Raises:
        IncompleteFile: the file is damaged.
    """
    with incomplete_if_unreadable(source.path):
        if source.open_mapped is not None:
            return source.open_mapped()
        copy = folder / CONVERTED
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".{CONVERTED}.{os.getpid()}"
            source.write(temporary)
            os.replace(temporary, copy)  # the copy appears under its name only when it is complete
        return np.load(copy, mmap_mode="r")


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a new memory-mapped .npy file whose space is reserved: a write without space would end the process."""
    rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if sys.platform == "linux":
        with path.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if is_full(error):  # other errors: the file system cannot reserve space
                    raise
    return rows


def _write_blocks(target: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> None:
    """Write rows that are read block by block."""
    rows = new_array(target, dtype, shape)
    done = 0
    for block in blocks:
        rows[done : done + len(block)] = block
        done += len(block)
    if done != shape[0]:
        raise ValueError(f"expected {shape[0]} rows, got {done}")
    rows.flush()


@contextlib.contextmanager
def incomplete_if_unreadable(path: Path) -> Iterator[None]:
    """Raise ``IncompleteFile`` for the errors that damaged files cause, and ``UserError`` for a missing file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as error:
        if is_full(error):
            raise
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
        raise IncompleteFile(
            f"{path}: the file is damaged or incomplete ({reason_of(error)}). Write it again; for the "
            "representation of a run, delete the file and encode that checkpoint again."
        ) from error


def _rows_per_block(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))))


def _choose(path: Path, found: Sequence[str], names: Sequence[str]) -> str:
    """Return the first of ``names`` that was found, or the only array."""
    chosen = next((name for name in names if name in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        raise UserError(f"{path}: expected an array named {' or '.join(names)}, got {', '.join(found) or 'no array'}")
    return chosen


def _read_npy(path: Path, names: Sequence[str]) -> ArraySource:
    with path.open("rb") as stream:
        shape, _, dtype = array_header(stream)
    if not dtype.hasobject:  # objects cannot be mapped; array_source rejects them
        np.load(path, mmap_mode="r")  # fails if the file is truncated
    return ArraySource(path, shape, dtype, lambda: np.load(path, mmap_mode="r"))


def _read_npz(path: Path, names: Sequence[str]) -> ArraySource:
    with zipfile.ZipFile(path) as archive:
        members = [entry.removesuffix(".npy") for entry in archive.namelist()]
        info = archive.getinfo(f"{_choose(path, members, names)}.npy")
        with archive.open(info) as stream:
            shape, _, dtype = array_header(stream)

    def write(target: Path) -> None:
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file)

    is_mapped = info.compress_type == zipfile.ZIP_STORED and not dtype.hasobject
    return ArraySource(path, shape, dtype, (lambda: _map_member(path, info)) if is_mapped else None, write)


def _map_member(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """Memory-map an uncompressed member of an archive after verifying its checksum."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return map_stored_member(path, info)


def _read_h5(path: Path, names: Sequence[str]) -> ArraySource:
    found: list[str] = []

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 1:
            found.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(note)
        name = _choose(path, found, names)
        shape, dtype = file[name].shape, np.dtype(file[name].dtype.str)  # without the metadata of HDF5

    def write(target: Path) -> None:
        step = _rows_per_block(shape, dtype)
        with h5py.File(path, "r") as file:
            blocks = (file[name][start : start + step] for start in range(0, shape[0], step))
            _write_blocks(target, shape, dtype, blocks)

    return ArraySource(path, shape, dtype, None, write)


def _read_table(path: Path, names: Sequence[str]) -> ArraySource:
    """Read the header of a table of numbers; columns of lists are vectors per unit."""
    table = open_table(path, "unit")
    row = _stacked(table, next(table.read(1, table.names)))
    shape = (table.num_rows, *row.shape[1:])

    def write(target: Path) -> None:
        blocks = table.read(_rows_per_block(shape, row.dtype), table.names)
        _write_blocks(target, shape, row.dtype, (_stacked(table, block, row.dtype) for block in blocks))

    return ArraySource(path, shape, row.dtype, None, write)


def _stacked(table: Table, columns: Sequence[np.ndarray], dtype: np.dtype | None = None) -> np.ndarray:
    """Stack columns of a table: numbers to (n, K), one column of lists to (n, K), several to (n, U, D).

    Raises:
        UserError: a value is missing or not a number, or lists of different columns have different lengths.
    """
    for name, column in zip(table.names, columns):
        if column.dtype.kind not in "fiub" or (dtype is not None and not np.can_cast(column.dtype, dtype, "same_kind")):
            values = table.values([name])[name].tolist()
            wrong = (row for row, value in enumerate(values) if not isinstance(value, Real) or value != value)
            row = table.words.get(name, next(wrong, 0))
            raise UserError(
                f"{table.path}: expected a number in every row, got {values[row]!r} in row {row}, column {name!r}. "
                "Remove columns of names, and rows without a value."
            )
    widths = {name: column.shape[1:] for name, column in zip(table.names, columns)}
    if len(set(widths.values())) > 1:
        lengths = ", ".join(f"{name} {list(width) or 1}" for name, width in widths.items())
        raise UserError(f"{table.path}: expected columns of equal numbers of values per row, got {lengths}.")
    return columns[0] if len(columns) == 1 and columns[0].ndim > 1 else np.stack(columns, axis=1)


_READERS: dict[str, Callable[[Path, Sequence[str]], ArraySource]] = {".npz": _read_npz, ".npy": _read_npy}
_READERS |= {".h5": _read_h5, ".hdf5": _read_h5, ".parquet": _read_table, ".csv": _read_table, ".tsv": _read_table}
