"""Reading single images out of big array files (HDF5, npz, npy), safely from several processes."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.cache import cache_folder
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

_SLOW_BYTES = 2**21  # decoding more than this for one image is too slow to train from
_BLOCK = 4096


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
        raise UserError(f"{path} cannot be read as HDF5 ({err}); expected a whole .h5 file. "
                        "Download or export it again, it may be truncated") from err


def read_h5_rows(images: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Rows of an HDF5 data set in any order, repeats allowed: (n,) int -> (n, ...).

    Raises:
        UserError: a damaged part of the file.
    """
    unique, inverse = np.unique(rows, return_inverse=True)
    try:
        return np.stack([images[row] for row in unique.tolist()])[inverse]  # h5py's own list indexing is slower
    except OSError as err:
        raise UserError(f"{images.file.filename}: images {unique[0]} to {unique[-1]} of '{images.name}' cannot be "
                        f"read ({err}); the file is damaged, download or export it again") from err


def is_slow_layout(images: h5py.Dataset) -> bool:
    """Whether one image costs the decoding of many (the published 3dshapes.h5 is chunked across images)."""
    if images.chunks is None:
        return False
    spans = [-(-size // chunk) for size, chunk in zip(images.shape[1:], images.chunks[1:])]
    return int(np.prod(spans)) * int(np.prod(images.chunks)) * images.dtype.itemsize > _SLOW_BYTES


def map_npz_member(path: Path, key: str) -> np.ndarray | None:
    """Map an array of an uncompressed .npz without reading it; None where it is compressed.

    Raises:
        UserError: no readable .npz, or no such key.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            try:
                member = archive.getinfo(f"{key}.npy")
            except KeyError:
                raise UserError(f"{path} has no array {key!r}; found "
                                f"{[name.removesuffix('.npy') for name in archive.namelist()]}") from None
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            raw.seek(member.header_offset + 26)
            name_length, extra_length = np.frombuffer(raw.read(4), "<u2").tolist()
            raw.seek(name_length + extra_length, os.SEEK_CUR)
            version = np.lib.format.read_magic(raw)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) \
                else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(raw)
            return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, zipfile.BadZipFile) as err:
        raise UserError(f"{path} cannot be read as .npz ({err}); expected a whole file. "
                        "Download it again, it may be truncated") from err


def halve(images: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 block, rounded: (n, H, W, C) uint8 -> (n, H/2, W/2, C) uint8."""
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2, c)
    return ((blocks.sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)


def image_cache(source: Path, size: int, count: int, read: Callable[[slice], np.ndarray]) -> Path:
    """A plain .npy of all images of a file that is too slow to train from; made once.

    Args:
        source: the file; a newer or other one gets a cache of its own.
        size: side of the images in pixels.
        count: number of images.
        read: gives a slice of them, (n, size, size, 3) uint8.

    Returns:
        Path of the .npy, (count, size, size, 3) uint8.

    Raises:
        UserError: no room or no right to write it.
    """
    stat = source.stat()
    path = cache_folder() / f"{source.stem}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{size}px.npy"
    expected = count * size * size * 3
    if path.exists() and path.stat().st_size > expected:
        return path
    logger.warning("%s is too slow to read image by image; unpacking it once to %s (%.1f GB)",
                   source, path, expected / 1e9)
    try:
        with atomic_write(path, "wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, count, _BLOCK):
                stream.write(np.ascontiguousarray(read(slice(start, min(start + _BLOCK, count)))).data)
    except OSError as err:
        raise UserError(f"{path} ({expected / 1e9:.1f} GB) could not be written ({err}); free some space, or name "
                        "another cache folder in the environment variable XDG_CACHE_HOME") from err
    return path
