"""Images that are stored row by row in one file: .npy, .npz or HDF5, channels last or first."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from ldm.data import rows as array_files
from ldm.data.rows import BLOCK, PerProcess, h5_array, halve
from ldm.util import UserError

H5_SUFFIXES = (".h5", ".hdf5")
SUFFIXES = (".npy", ".npz", *H5_SUFFIXES)


class ImageSource(ABC):
    """Stored images of a data set that any process can read by row.

    Attributes:
        path: file or folder.
        count: number of images.
        shape: (H, W, C) of one image in the file.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    _halved = False

    @abstractmethod
    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of images in any order, with repeats: (n,) int -> (n, *shape) uint8."""

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all images in order, some thousands at a time, without a cache on disk."""
        for start in range(0, self.count, BLOCK):
            yield self.read(np.arange(start, min(start + BLOCK, self.count)))

    def prepare(self, halved: bool = False) -> None:
        """Prepare fast reading by row, with a cache on disk if needed; called before worker processes start.

        Args:
            halved: from now on, return images of half the size, means of 2 x 2 pixels.
        """
        self._halved = halved


class CachedSource(ImageSource):
    """Source that is unpacked once to a plain .npy if reading single images is slow.

    Args:
        path: file or folder.
        files: files that the images depend on; a change of them makes a new cache.
        count: number of images.
        shape: (H, W, C) of one image.
        is_slow: whether images have to be unpacked before they are read by row.
    """

    def __init__(self, path: Path, files: Sequence[Path], count: int, shape: tuple[int, ...], is_slow: bool) -> None:
        self.path, self.count, self.shape, self.is_slow = path, count, shape, is_slow
        self._name = f"{path.stem}-{array_files.fingerprint(*files)}"
        self._cached: PerProcess | None = None

    def read_in_place(self, rows: np.ndarray) -> np.ndarray:
        """Return images like ``read``, for a source that is not slow."""
        raise NotImplementedError

    def read(self, rows: np.ndarray) -> np.ndarray:
        if self._cached is None and self.is_slow:
            self.prepare(self._halved)
        if self._cached is not None:
            return np.array(self._cached.get()[rows])
        pixels = self.read_in_place(rows)
        return halve(pixels) if self._halved else pixels

    def prepare(self, halved: bool = False) -> None:
        super().prepare(halved)
        self._cached = None
        if self.is_slow:
            height, width, channels = self.shape
            size = (height // 2, width // 2, channels) if halved else self.shape
            blocks = map(halve, self.blocks()) if halved else self.blocks()
            path = array_files.image_cache(f"{self._name}-{size[0]}px", (self.count, *size), blocks)
            self._cached = PerProcess(partial(array_files.map_npy, path))


class ImageArray(CachedSource):
    """Images in an array of a file: (N, H, W, C), (N, C, H, W) or, for grey images, (N, H, W), uint8.

    Uncompressed files are mapped, and HDF5 is read image by image. Compressed .npz files, and HDF5 files whose chunks
    span many images (as in the published 3dshapes.h5), are slow.

    Args:
        path: the file.
        key: name of the array in an .npz or HDF5 file.
        size: (H, W) that the images must have; None accepts any size.
        channels: number of channels that the images must have; grey images get an axis.
        scale: factor on every byte, for files of 0 and 1.

    Raises:
        UserError: the file or array is missing or truncated, or its type or shape is wrong.
    """

    def __init__(
        self,
        path: Path,
        key: str = "images",
        size: tuple[int, int] | None = (64, 64),
        channels: int = 3,
        scale: int = 1,
    ) -> None:
        self.key, self._scale = key, np.uint8(scale)
        self._array = PerProcess(partial(_open_array, path, key))
        found, dtype, is_slow = _inspect(path, key)
        self._axes = _layout(path, key, found, dtype, size, channels)
        shape = (*(found[axis] for axis in self._axes[1:]), *(() if len(found) == 4 else (1,)))
        super().__init__(path, [path], found[0], shape, is_slow)

    def read_in_place(self, rows: np.ndarray) -> np.ndarray:
        array = self._array.get()
        return self._in_order(array_files.read_h5_rows(array, rows) if isinstance(array, h5py.Dataset) else array[rows])

    def blocks(self) -> Iterator[np.ndarray]:
        if self.path.suffix == ".npz":
            yield from map(self._in_order, array_files.npz_blocks(self.path, self.key))
            return
        array = self._array.get()
        for start in range(0, self.count, BLOCK):
            try:
                pixels = array[start : start + BLOCK]
            except OSError as error:
                raise UserError(
                    f"{self.path}: images {start} to {start + BLOCK - 1} of {self.key!r} cannot be read ({error}). The "
                    "file is damaged: download or export it again."
                ) from error
            yield self._in_order(pixels)

    def _in_order(self, pixels: np.ndarray) -> np.ndarray:
        """Move the channels to the last axis and scale the bytes."""
        pixels = np.ascontiguousarray(pixels.transpose(self._axes))
        pixels = pixels * self._scale if self._scale != 1 else pixels
        return pixels if pixels.ndim == 4 else pixels[..., None]


def _open_array(path: Path, key: str) -> np.ndarray | h5py.Dataset:
    if path.suffix == ".npy":
        return array_files.map_npy(path)
    return array_files.map_npz_member(path, key) if path.suffix == ".npz" else h5_array(path, key)


def _inspect(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Return shape and type of an array, and whether reading single images is slow; leave no file open."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected an array file ({', '.join(SUFFIXES)}).")
    if path.suffix == ".npz":
        member, shape, fortran, dtype = array_files.npz_member(path, key)
        return shape, dtype, fortran or member.compress_type != zipfile.ZIP_STORED
    array = _open_array(path, key)
    if path.suffix == ".npy":
        return array.shape, array.dtype, False
    with array.file:
        return array.shape, array.dtype, array_files.is_slow_layout(array)


def _layout(
    path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, size: tuple[int, int] | None, channels: int
) -> tuple[int, ...]:
    """Return the order of the axes that puts the channels last."""
    if not np.prod(shape):
        raise UserError(f"{path}: expected images in {key!r}, got none: its shape is {tuple(shape)}. Write it again.")
    if dtype == np.uint8:
        for axes in {3: ((0, 1, 2),), 4: ((0, 1, 2, 3), (0, 2, 3, 1))}.get(len(shape), ()):
            height, width, *depth = (shape[axis] for axis in axes[1:])
            if (depth or [1]) == [channels] and size in (None, (height, width)):
                return axes
    height, width = ("H", "W") if size is None else size
    depth = f", {channels}" if channels > 1 else ""
    raise UserError(
        f"{path}: expected {key!r} of shape (N, {height}, {width}{depth}) uint8, or channels first; got {tuple(shape)} "
        f"{dtype}. Convert it, or set path: to another file."
    )
