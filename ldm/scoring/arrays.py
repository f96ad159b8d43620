"""Arrays of any origin, read without filling the memory: .npz, .npy, .h5, .parquet and .csv.

Plain ``.npy`` files and the members of uncompressed ``.npz`` files are memory-mapped where they lie. Everything else is
read in blocks of rows and written once as a ``.npy`` file, which is mapped then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.util import UserError

BLOCK_BYTES = 32_000_000  # read at once
CONVERTED = "latents.npy"  # what a file that cannot be mapped becomes
LATENTS = ("latents", "codes", "representations", "embeddings", "z")  # what files call them


class IncompleteFile(UserError):
    """A file is damaged, or somebody is still writing it."""


@dataclass(frozen=True)
class ArraySource:
    """An array in a file, of which only the head has been read.

    Attributes:
        path: the file.
        shape: of the array; the first axis counts images.
        dtype: of its values.
        open_mapped: maps the file where it lies; None where that cannot be.
        blocks: yields the rows in order, a block at a time.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]
    open_mapped: Callable[[], np.ndarray] | None = None


def array_source(path: Path, names: Sequence[str] = LATENTS) -> ArraySource:
    """Look at the head of a file.

    Args:
        path: ``.npz``, ``.npy``, ``.h5``/``.hdf5``, ``.parquet`` or ``.csv``. Columns of a table are units, or vectors
            per unit where each holds lists.
        names: names of the array in files that hold several, the best first; any other is taken only if it is alone.

    Raises:
        IncompleteFile: the file is damaged or not complete.
        UserError: no such file, another kind of file, or no array of numbers in it.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: expected an array with one row per image")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without ending'}; expected {', '.join(_READERS)}")
    with repairable(path):
        source = reader(path, names)
    if source.dtype.kind not in "fiu":
        raise UserError(f"{path}: its values are of type {source.dtype}; expected numbers")
    return source


def open_array(source: ArraySource, folder: Path) -> np.ndarray:
    """The array, memory-mapped: the file itself, or a copy made once in ``folder``.

    Raises:
        IncompleteFile: the file is damaged.
    """
    with repairable(source.path):
        if source.open_mapped is not None:
            return source.open_mapped()
        copy = folder / CONVERTED
        if not copy.is_file():
            _convert(source, copy)
        return np.load(copy, mmap_mode="r")


def _convert(source: ArraySource, target: Path) -> None:
    """Write the rows to a ``.npy`` file in one step, so that no other process ever sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        rows = np.lib.format.open_memmap(temporary, "w+", source.dtype, source.shape)
        done = 0
        for block in source.blocks():
            rows[done : done + len(block)] = block
            done += len(block)
        if done != source.shape[0]:
            raise ValueError(f"{done} rows instead of {source.shape[0]}")
        rows.flush()
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def repairable(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one message."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as err:
        raise IncompleteFile(
            f"{path} is damaged or not complete ({' '.join(str(err).split())}); if nothing is writing it any more, "
            "make it again (a run's representation: delete it and encode that checkpoint again)"
        ) from err


def _rows_per_block(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))))


def _slices(array: Any) -> Iterator[np.ndarray]:
    """Blocks of anything that has a shape and can be sliced."""
    step = _rows_per_block(array.shape, array.dtype)
    for start in range(0, array.shape[0], step):
        yield np.asarray(array[start : start + step])


def choose(path: Path, found: Sequence[str], names: Sequence[str]) -> str:
    """The array that is meant: the first of ``names`` that is there, or the only one.

    Raises:
        UserError: none or several come into question.
    """
    for name in names:
        if name in found:
            return name
    if len(found) == 1:
        return found[0]
    raise UserError(f"{path} holds {', '.join(found) or 'nothing'}; expected an array named {' or '.join(names)}")


def _read_npy(path: Path, names: Sequence[str]) -> ArraySource:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return ArraySource(path, array.shape, array.dtype, lambda: _slices(array), lambda: np.load(path, mmap_mode="r"))


def _read_npz(path: Path, names: Sequence[str]) -> ArraySource:
    with zipfile.ZipFile(path) as archive:
        members = [entry.removesuffix(".npy") for entry in archive.namelist()]
        info = archive.getinfo(f"{choose(path, members, names)}.npy")
        with archive.open(info) as stream:
            shape, fortran_order, dtype = array_header(stream)
    mapped = None
    if info.compress_type == zipfile.ZIP_STORED and not dtype.hasobject:
        mapped = lambda: _map_member(path, info.filename)  # noqa: E731  a field, not a function of its own
    return ArraySource(path, shape, dtype, lambda: _member_blocks(path, info.filename), mapped)


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an array in .npy format; leaves the stream at its first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _map_member(path: Path, member: str) -> np.ndarray:
    """Map an uncompressed member of an archive where it lies, once its checksum has been found right."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        info = archive.getinfo(member)
        with archive.open(info) as stream:
            shape, fortran_order, dtype = array_header(stream)
            header_bytes = stream.tell()
    with path.open("rb") as raw:  # the local file header of the zip format: 30 bytes, name, extra field
        raw.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _member_blocks(path: Path, member: str) -> Iterator[np.ndarray]:
    """Unpack a compressed member block by block."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        shape, fortran_order, dtype = array_header(stream)
        if fortran_order:  # columns come first, so there are no blocks of rows
            yield np.frombuffer(stream.read(), dtype).reshape(shape, order="F")
            return
        row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        for start in range(0, shape[0], step := _rows_per_block(shape, dtype)):
            rows = min(step, shape[0] - start)
            yield np.frombuffer(stream.read(rows * row_bytes), dtype).reshape(rows, *shape[1:])


def _read_h5(path: Path, names: Sequence[str]) -> ArraySource:
    import h5py

    found: list[str] = []

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 1:
            found.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(note)
        name = choose(path, found, names)
        shape, dtype = file[name].shape, file[name].dtype

    def blocks() -> Iterator[np.ndarray]:
        with h5py.File(path, "r") as again:
            yield from _slices(again[name])

    return ArraySource(path, shape, dtype, blocks)


def parquet_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as err:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install -e .[parquet]") from err
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as err:
        raise ValueError(err) from err


def _read_parquet(path: Path, names: Sequence[str]) -> ArraySource:
    file = parquet_file(path)
    first = next(file.iter_batches(batch_size=1), None)
    if first is None:
        raise ValueError("it has no rows")
    row = _stacked(first)
    shape = (file.metadata.num_rows, *row.shape[1:])

    def blocks() -> Iterator[np.ndarray]:
        for batch in parquet_file(path).iter_batches(batch_size=_rows_per_block(shape, row.dtype)):
            yield _stacked(batch)

    return ArraySource(path, shape, row.dtype, blocks)


def _stacked(batch: Any) -> np.ndarray:
    """Columns of a table: numbers (n, K), one column of lists (n, K), several columns of lists (n, U, D)."""
    columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
    if columns and all(column.dtype == object and isinstance(column[0], np.ndarray) for column in columns):
        columns = [np.stack(list(column)) for column in columns]
        return columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    return np.stack(columns, axis=1)


def _read_csv(path: Path, names: Sequence[str]) -> ArraySource:
    with path.open(encoding="utf-8") as stream:
        has_names = not _is_numbers(stream.readline())
    rows = np.loadtxt(path, delimiter=",", skiprows=int(has_names), ndmin=2)
    return ArraySource(path, rows.shape, rows.dtype, lambda: itertools.chain([rows]))


def _is_numbers(line: str) -> bool:
    try:
        [float(word) for word in line.split(",")]
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path, Sequence[str]], ArraySource]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".h5": _read_h5,
    ".hdf5": _read_h5,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
