"""Images that lie row by row in one file, whatever its kind: .npy, .npz or HDF5, channels last or first."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from ldm.data.rows import (
    BLOCK,
    PerProcess,
    fingerprint,
    halve,
    image_cache,
    is_slow_layout,
    map_npy,
    map_npz_member,
    npz_blocks,
    npz_member,
    open_h5,
    read_h5_rows,
)
from ldm.util import UserError

H5_SUFFIXES = (".h5", ".hdf5")
SUFFIXES = (".npy", ".npz", *H5_SUFFIXES)


class ImageSource(ABC):
    """Images of a data set on disk, read by row from any process.

    Attributes:
        path: file or folder.
        count: number of images.
        shape: (H, W, C) of one as it is read.
    """

    path: Path
    count: int
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images of rows in any order, repeats allowed: (n,) int -> (n, *shape) uint8, an array of one's own."""

    def blocks(self) -> Iterator[np.ndarray]:
        """All images in order, some thousands at a time, without keeping anything on disk."""
        for start in range(0, self.count, BLOCK):
            yield self.read(np.arange(start, min(start + BLOCK, self.count)))

    def prepare(self, halved: bool = False) -> None:
        """Make reading by row quick, unpacking to the cache where needed; before worker processes start.

        Args:
            halved: images of half the size, means of 2 x 2 pixels, are wanted from now on.
        """
        self._halved = halved

    _halved = False


class CachedSource(ImageSource):
    """A source whose single images may be too slow to reach: then they are unpacked once to a plain .npy.

    Args:
        path: file or folder.
        files: the files whose change makes another cache.
        count: number of images.
        shape: (H, W, C) of one.
        is_slow: whether images have to be unpacked before they are read by row.
    """

    def __init__(self, path: Path, files: Sequence[Path], count: int, shape: tuple[int, ...], is_slow: bool) -> None:
        self.path, self.count, self.shape, self.is_slow = path, count, shape, is_slow
        self._name = f"{path.stem}-{fingerprint(*files)}"
        self._cached: PerProcess | None = None

    def read_in_place(self, rows: np.ndarray) -> np.ndarray:
        """``read`` of a source that is not slow."""
        raise NotImplementedError

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See ``ImageSource``."""
        if self._cached is None and self.is_slow:
            self.prepare(self._halved)
        if self._cached is not None:
            return np.array(self._cached.get()[rows])
        pixels = self.read_in_place(rows)
        return halve(pixels) if self._halved else pixels

    def prepare(self, halved: bool = False) -> None:
        """See ``ImageSource``."""
        super().prepare(halved)
        self._cached = None
        if self.is_slow:
            height, width, channels = self.shape
            size = (height // 2, width // 2, channels) if halved else self.shape
            path = image_cache(f"{self._name}-{size[0]}px", (self.count, *size), self._blocks_of_size)
            self._cached = PerProcess(_Mapped(path))

    def _blocks_of_size(self) -> Iterator[np.ndarray]:
        return (halve(block) if self._halved else block for block in self.blocks())


class _Mapped:
    """Opens a .npy; picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> np.ndarray:
        return map_npy(self.path)


class ImageArray(CachedSource):
    """Images in an array of a file: (N, H, W, C), (N, C, H, W) or, in grey, (N, H, W), uint8.

    Uncompressed files are mapped, HDF5 is read image by image. Compressed .npz files, and HDF5 files whose chunks
    span many images (as the published 3dshapes.h5), are slow.

    Args:
        path: the file.
        key: name of the array in an .npz or HDF5 file.
        size: (H, W) that images must have; None accepts any.
        channels: that images must have; grey ones get an axis.
        scale: factor on every byte, for files that hold 0 and 1.

    Raises:
        UserError: no such file or array, another type or shape, or a truncated file.
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
        self._array = PerProcess(_Opened(path, key))
        found, dtype, is_slow = _head(path, key)
        self._axes = _layout(path, key, found, dtype, size, channels)
        shape = (*(found[axis] for axis in self._axes[1:]), *(() if len(found) == 4 else (1,)))
        super().__init__(path, [path], found[0], shape, is_slow)

    def read_in_place(self, rows: np.ndarray) -> np.ndarray:
        """See ``CachedSource``."""
        array = self._array.get()
        return self._in_order(read_h5_rows(array, rows) if isinstance(array, h5py.Dataset) else array[rows])

    def blocks(self) -> Iterator[np.ndarray]:
        """See ``ImageSource``."""
        if self.path.suffix == ".npz":
            parts = npz_blocks(self.path, self.key)
        else:
            parts = (self._slice(start) for start in range(0, self.count, BLOCK))
        return (self._in_order(part) for part in parts)

    def _slice(self, start: int) -> np.ndarray:
        array = self._array.get()
        try:
            return array[start : start + BLOCK]
        except OSError as err:
            raise UserError(
                f"{self.path}: images {start} to {start + BLOCK - 1} of {self.key!r} cannot be read "
                f"({err}); the file is damaged, download or export it again"
            ) from err

    def _in_order(self, pixels: np.ndarray) -> np.ndarray:
        """Channels last, bytes scaled."""
        pixels = np.ascontiguousarray(pixels.transpose(self._axes))
        pixels = pixels * self._scale if self._scale != 1 else pixels
        return pixels if pixels.ndim == 4 else pixels[..., None]


class _Opened:
    """Opens the array of a file; picklable."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __call__(self) -> np.ndarray | h5py.Dataset:
        if self.path.suffix == ".npy":
            return map_npy(self.path)
        return map_npz_member(self.path, self.key) if self.path.suffix == ".npz" else h5_array(self.path, self.key)


def h5_array(path: Path, key: str) -> h5py.Dataset:
    """An array of an HDF5 file.

    Raises:
        UserError: a truncated file, or no such array in it.
    """
    file = open_h5(path)
    if key not in file:
        raise UserError(f"{path} has no {key!r}; found {sorted(file)}")
    return file[key]


def _head(path: Path, key: str) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape and type of the array, and whether its images are slow to reach. Leaves nothing open."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no array file; expected {', '.join(SUFFIXES)}")
    if path.suffix == ".npz":
        member, shape, fortran, dtype = npz_member(path, key)
        return shape, dtype, fortran or member.compress_type != zipfile.ZIP_STORED
    array = _Opened(path, key)()
    if path.suffix == ".npy":
        return array.shape, array.dtype, False
    with array.file:
        return array.shape, array.dtype, is_slow_layout(array)


def _layout(
    path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, size: tuple[int, int] | None, channels: int
) -> tuple[int, ...]:
    """Order of the axes that puts the channels last."""
    wanted_size = ("H", "W") if size is None else size
    wanted = f"(N, {', '.join(map(str, wanted_size))}{f', {channels}' if channels > 1 else ''})"
    if dtype == np.uint8:
        for axes in {3: ((0, 1, 2),), 4: ((0, 1, 2, 3), (0, 2, 3, 1))}.get(len(shape), ()):
            height, width, *depth = (shape[axis] for axis in axes[1:])
            if (depth or [1]) == [channels] and size in (None, (height, width)):
                return axes
    raise UserError(
        f"{path}: {key!r} is {tuple(shape)} {dtype}, expected {wanted} uint8, or channels first; convert "
        "it, or name another file in path:"
    )
