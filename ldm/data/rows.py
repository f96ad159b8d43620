"""Reading single images out of big array files (HDF5, npz, npy), safely from several processes."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from ldm.data.cache import cache_folder
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

_SLOW_BYTES = 2**21  # decoding more than this for one image is too slow to train from
BLOCK = 4096  # images handled at once where all of them are


class PerProcess:
    """Something opened on first use, and opened again in each worker process; it travels closed.

    Args:
        open: makes it; must be picklable where workers are spawned.
    """

    def __init__(self, open: Callable[[], Any]) -> None:
        self._open = open
        self._value: Any = None
        self._process: int | None = None

    def get(self) -> Any:
        """The thing, opened in this process."""
        if self._process != os.getpid():
            self._value, self._process = self._open(), os.getpid()
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open, "_value": None, "_process": None}


def open_h5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises:
        UserError: missing, truncated or no HDF5 file.
    """
    try:
        return h5py.File(path, "r")
    except OSError as err:
        raise UserError(
            f"{path} cannot be read as HDF5 ({err}); expected a whole .h5 file. "
            "Download or export it again, it may be truncated"
        ) from err


def read_h5_rows(images: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Rows of an HDF5 data set in any order, repeats allowed: (n,) int -> (n, ...).

    Raises:
        UserError: a damaged part of the file.
    """
    unique, inverse = np.unique(rows, return_inverse=True)
    try:
        return np.stack([images[row] for row in unique.tolist()])[inverse]  # h5py's own list indexing is slower
    except OSError as err:
        raise UserError(
            f"{images.file.filename}: images {unique[0]} to {unique[-1]} of '{images.name}' cannot be "
            f"read ({err}); the file is damaged, download or export it again"
        ) from err


def is_slow_layout(images: h5py.Dataset) -> bool:
    """Whether one image costs the decoding of many (the published 3dshapes.h5 is chunked across images)."""
    if images.chunks is None:
        return False
    spans = [-(-size // chunk) for size, chunk in zip(images.shape[1:], images.chunks[1:])]
    return int(np.prod(spans)) * int(np.prod(images.chunks)) * images.dtype.itemsize > _SLOW_BYTES


def npz_member(path: Path, key: str) -> tuple[zipfile.ZipInfo, tuple[int, ...], bool, np.dtype]:
    """Where an array of an .npz lies, its shape, whether it is in Fortran order, and its type; nothing is read.

    Raises:
        UserError: no readable .npz, or no such key.
    """
    with _readable_npz(path), zipfile.ZipFile(path) as archive:
        try:
            member = archive.getinfo(f"{key}.npy")
        except KeyError:
            raise UserError(
                f"{path} has no array {key!r}; found {[name.removesuffix('.npy') for name in archive.namelist()]}"
            ) from None
        with archive.open(member) as stream:
            return member, *_array_header(stream)


def map_npz_member(path: Path, key: str) -> np.ndarray | None:
    """Map an array of an uncompressed .npz without reading it; None where it is compressed.

    Raises:
        UserError: no readable .npz, or no such key.
    """
    member, shape, fortran, dtype = npz_member(path, key)
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with _readable_npz(path), open(path, "rb") as raw:
        raw.seek(member.header_offset + 26)  # the local header of the zip format: 30 bytes, name, extra field
        name_length, extra_length = np.frombuffer(raw.read(4), "<u2").tolist()
        raw.seek(name_length + extra_length, os.SEEK_CUR)
        _array_header(raw)
        return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")


def npz_blocks(path: Path, key: str, block: int = BLOCK) -> Iterator[np.ndarray]:
    """An array of an .npz in blocks of its first axis, unpacked as they come: memory holds one block.

    Raises:
        UserError: a damaged file.
    """
    member, shape, fortran, dtype = npz_member(path, key)
    with _readable_npz(path), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        if fortran:  # no block of rows lies together
            stream.seek(0)
            yield np.lib.format.read_array(stream, allow_pickle=False)
            return
        _array_header(stream)
        row = int(np.prod(shape[1:])) * dtype.itemsize
        for start in range(0, shape[0], block):
            count = min(block, shape[0] - start)
            data = stream.read(count * row)
            if len(data) < count * row:
                raise EOFError(f"{key!r} ends in row {start + len(data) // row} of {shape[0]}")
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array in .npy format; leaves the stream at its first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


@contextmanager
def _readable_npz(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as err:
        raise UserError(
            f"{path} cannot be read as .npz ({err}); expected a whole file. Download it again, it may be truncated"
        ) from err


def map_npy(path: Path) -> np.ndarray:
    """Map a .npy file.

    Raises:
        UserError: no .npy, or shorter than its header says.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise UserError(
            f"{path} cannot be read as .npy ({err}); expected a whole file. "
            "Download or convert it again, it may be truncated"
        ) from err


def halve(images: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 block, rounded: (n, H, W, C) uint8 -> (n, H/2, W/2, C) uint8."""
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2, c)
    return ((blocks.sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)


def write_npy(path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write blocks (n, ...) uint8 one after the other as one .npy of ``shape``; whole or not at all.

    Raises:
        UserError: no room or no right to write it.
    """
    with explained_writing(path, int(np.prod(shape))), atomic_write(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in blocks:
            stream.write(np.ascontiguousarray(block).data)


@contextmanager
def explained_writing(path: Path, num_bytes: int) -> Iterator[None]:
    """Look at the disk before writing, and say what went wrong in words.

    Args:
        path: what is written.
        num_bytes: at most so much.

    Raises:
        UserError: too little room, or no right to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise OSError(f"the disk has {free / 1e9:.1f} GB left")
        yield
    except OSError as err:
        raise UserError(
            f"{path} ({num_bytes / 1e9:.1f} GB) could not be written ({err}); free some space, or choose "
            "another place (caches: the environment variable XDG_CACHE_HOME)"
        ) from err


def fingerprint(*files: Path) -> str:
    """Changes with the name, size or time of any of the files."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def image_cache(name: str, shape: tuple[int, ...], blocks: Callable[[], Iterable[np.ndarray]]) -> Path:
    """A plain .npy of all images of something that is too slow to train from; made once.

    Args:
        name: of the images, to be another one where they are others (``fingerprint``).
        shape: (count, H, W) or (count, H, W, C).
        blocks: gives the images in order.

    Returns:
        Path of the .npy, ``shape`` uint8.

    Raises:
        UserError: no room or no right to write it.
    """
    path, num_bytes = cache_folder() / f"{name}.npy", int(np.prod(shape))
    if not _is_whole(path, num_bytes):
        with explained_writing(path, 0), _one_at_a_time(path):
            if not _is_whole(path, num_bytes):  # not made by another process in the meantime
                logger.warning("images are unpacked once to %s (%.1f GB)", path, num_bytes / 1e9)
                write_npy(path, shape, blocks())
    return path


def _is_whole(path: Path, num_bytes: int) -> bool:
    return path.exists() and path.stat().st_size > num_bytes


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait while another process (of the same training on several devices) is here, where the system can tell."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows: each makes its own copy, the last one stays
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
