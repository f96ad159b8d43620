"""Array files (HDF5, npz, npy) of images: reading of single rows in several processes, writing, and caches.

If a file is missing, damaged or cannot be written, the functions raise a ``UserError`` with the path and the next step.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from einops import rearrange
from filelock import FileLock

from ldm.data.paths import AnyPath, cache_folder
from ldm.errors import reason_of
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

_SLOW_BYTES = 2**21  # decoding more than this for one image is too slow for training
BLOCK = 4096  # images per block where all images are processed


class PerProcess:
    """Object that is opened on first use, and again in each worker process; it is pickled without the open object.

    Args:
        open: function that opens the object; must be picklable where workers are spawned.
    """

    def __init__(self, open: Callable[[], Any]) -> None:
        self._open = open
        self._value: Any = None
        self._process: int | None = None

    def get(self) -> Any:
        """Return the object, opened in this process."""
        if self._process != os.getpid():
            self._value, self._process = self._open(), os.getpid()
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open, "_value": None, "_process": None}


def h5_array(path: Path, key: str) -> h5py.Dataset:
    """Return an array of an HDF5 file, which stays open; raise a ``UserError`` if it is damaged or has none."""
    with readable(path, "HDF5"):
        file = h5py.File(path, "r")
    array = file.get(key)
    if not isinstance(array, h5py.Dataset):
        raise UserError(f"{path}: expected an array {key!r}, got only {sorted(file)}.")
    return array


def read_h5_rows(images: h5py.Dataset, rows: np.ndarray) -> np.ndarray:
    """Read rows of an HDF5 data set in any order, with repeats: (n,) int -> (n, ...)."""
    unique, inverse = np.unique(rows, return_inverse=True)
    try:
        return np.stack([images[row] for row in unique.tolist()])[inverse]  # h5py's own list indexing is slower
    except OSError as error:
        raise UserError(
            f"{images.file.filename}: images {unique[0]} to {unique[-1]} of {images.name!r} cannot be read ({error}). "
            "The file is damaged: download or export it again."
        ) from error


def is_slow_layout(images: h5py.Dataset) -> bool:
    """Return whether reading one image decodes many (the published 3dshapes.h5 is chunked across images)."""
    if images.chunks is None:
        return False
    spans = [-(-size // chunk) for size, chunk in zip(images.shape[1:], images.chunks[1:])]
    return int(np.prod(spans)) * int(np.prod(images.chunks)) * images.dtype.itemsize > _SLOW_BYTES


def npz_member(path: Path, key: str) -> tuple[zipfile.ZipInfo, tuple[int, ...], bool, np.dtype]:
    """Return zip entry, shape, whether the order is Fortran's, and type of an array in an .npz, without reading it."""
    with readable(path, ".npz"), zipfile.ZipFile(path) as archive:
        try:
            member = archive.getinfo(f"{key}.npy")
        except KeyError:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            raise UserError(f"{path}: expected an array {key!r}, got only {names}.") from None
        with archive.open(member) as stream:
            return member, *array_header(stream)


def map_npz_member(path: Path, key: str) -> np.ndarray | None:
    """Map an array of an uncompressed .npz without reading it; None if it is compressed."""
    member = npz_member(path, key)[0]
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with readable(path, ".npz"):
        return map_stored_member(path, member)


def map_stored_member(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """Map an array that an .npz contains uncompressed; raises the errors of NumPy if the file is damaged."""
    with open(path, "rb") as raw:
        raw.seek(member.header_offset + 26)  # the local header of the zip format: 30 bytes, name, extra field
        name_length, extra_length = np.frombuffer(raw.read(4), "<u2").tolist()
        raw.seek(name_length + extra_length, os.SEEK_CUR)
        shape, fortran, dtype = array_header(raw)
        return np.memmap(path, dtype, "r", raw.tell(), shape, "F" if fortran else "C")


def npz_blocks(path: Path, key: str, block: int = BLOCK) -> Iterator[np.ndarray]:
    """Yield an array of an .npz in blocks of its first axis; only one block is in memory at a time."""
    member, shape, fortran, dtype = npz_member(path, key)
    with readable(path, ".npz"), zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        if fortran:  # rows are not contiguous
            stream.seek(0)
            yield np.lib.format.read_array(stream, allow_pickle=False)
            return
        array_header(stream)
        row = int(np.prod(shape[1:])) * dtype.itemsize
        for start in range(0, shape[0], block):
            count = min(block, shape[0] - start)
            data = stream.read(count * row)
            if len(data) < count * row:
                raise EOFError(f"{key!r} ends in row {start + len(data) // row} of {shape[0]}")
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, order and type of an array in .npy format; leave the stream at its first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def map_npy(path: Path) -> np.ndarray:
    """Map a .npy file."""
    with readable(path, ".npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


@contextmanager
def readable(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of reading a damaged file, and ``errors``, into a ``UserError``."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: expected a {kind} file, got no such file. Correct the path.") from error
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, *errors) as error:
        raise UserError(
            f"{path}: expected a complete {kind} file, but reading failed ({reason_of(error)}). It may be truncated "
            "or damaged: replace it."
        ) from error


def check_parts(path: AnyPath) -> None:
    """Compare the parts of a zip file with their checksums, which torch and memory-mapped arrays do not check.

    It takes about 0.03 s for 100 MB. Files written without checksums have zeros, which are not compared.

    Raises:
        zipfile.BadZipFile: a part has changed.
    """
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.CRC and part.compress_type == zipfile.ZIP_STORED:  # others are checked when they are unpacked
                with archive.open(part) as stream:
                    while stream.read(1 << 20):
                        pass


def halve(images: np.ndarray) -> np.ndarray:
    """Return the rounded mean of each 2 x 2 block: (n, H, W, C) uint8 -> (n, H/2, W/2, C) uint8."""
    blocks = rearrange(images, "n (h p) (w q) c -> n h p w q c", p=2, q=2)
    return ((blocks.sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)


def write_npy(path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write blocks (n, ...) uint8 one after another as one .npy of ``shape``, atomically."""
    with explained_writing(path, int(np.prod(shape))), atomic_write(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in blocks:
            stream.write(np.ascontiguousarray(block).data)


def append_npy(path: Path, shape: tuple[int, ...], block: int, blocks: Callable[[int], Iterable[np.ndarray]]) -> None:
    """Write a .npy of float32 block by block. If the process is killed, the next call continues after the last block.

    Until it is complete, the file is hidden beside ``path``. The caller excludes a second process.

    Args:
        path: file to write.
        shape: shape of the array.
        block: rows of a block.
        blocks: function of the number of finished rows, which yields the blocks after them, (block, ...) float32 each.

    Raises:
        UserError: the file cannot be written.
    """
    part, header = path.with_name(f".{path.name}.part"), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start, row = len(header.getvalue()), 4 * int(np.prod(shape[1:]))
    written = part.stat().st_size if part.exists() else 0
    with explained_writing(path, shape[0] * row - written), open(part, "a+b") as stream:
        stream.seek(0)
        if stream.read(start) != header.getvalue():
            stream.truncate(0)
            written = stream.write(header.getvalue())
        done = max(0, written - start) // (block * row) * block
        stream.truncate(start + done * row)  # an incomplete block
        for values in blocks(done):
            try:
                stream.write(np.ascontiguousarray(values, "<f4").data)
                stream.flush()
            except OSError:  # leaves the disk to the run
                part.unlink()
                raise
        os.fsync(stream.fileno())
        part.replace(path)


def write_h5(
    path: AnyPath,
    shape: tuple[int, ...],
    blocks: Iterable[np.ndarray],
    arrays: Callable[[], Mapping[str, np.ndarray]] = dict,
    attributes: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``images`` and further arrays in HDF5, atomically. Each image is a compressed chunk, which is read fast.

    Args:
        path: file to write.
        shape: (count, H, W, C) of the images.
        blocks: the images in order, (n, H, W, C) uint8 each.
        arrays: function that returns further arrays by name (strings as objects), called after the last image.
        attributes: attributes of the file.
        on_progress: called with the number of images written so far.

    Raises:
        UserError: the file cannot be written.
    """
    target, options = Path(path), {"chunks": (1, *shape[1:]), "compression": "gzip", "compression_opts": 1}
    with (
        explained_writing(target, int(np.prod(shape))),
        atomic_write(target, "w+b") as stream,
        h5py.File(stream, "w") as file,
    ):
        images = file.create_dataset("images", shape, np.uint8, **options)
        done = 0
        for block in blocks:
            images[done : done + len(block)] = block
            done += len(block)
            on_progress(done)
        for name, array in arrays().items():
            file.create_dataset(name, data=array, dtype=h5py.string_dtype() if array.dtype == object else None)
        file.attrs.update(attributes or {})


@contextmanager
def explained_writing(path: Path, num_bytes: int) -> Iterator[None]:
    """Check the disk space for ``num_bytes``, and turn an ``OSError`` into a message with the next step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise OSError(f"the disk has {free / 1e9:.1f} GB left")
        yield
    except OSError as error:
        raise UserError(
            f"{path}: {num_bytes / 1e9:.1f} GB could not be written ({error}). Free some disk space, or choose another "
            "folder (caches: the environment variable XDG_CACHE_HOME)."
        ) from error


def fingerprint(*files: Path) -> str:
    """Return a hash of the names, sizes and modification times of files."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def image_cache(name: str, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> Path:
    """Return a .npy of all images of a source that is too slow for training; one process writes it once.

    Args:
        name: name of the cache, unique to the images (``fingerprint``).
        shape: (count, H, W) or (count, H, W, C).
        blocks: the images in order; not read if the cache exists.

    Returns:
        Path of the .npy, ``shape`` uint8.
    """
    path, num_bytes = cache_folder() / f"{name}.npy", int(np.prod(shape))
    if not _is_complete(path, num_bytes):
        with explained_writing(path, 0), FileLock(path.with_suffix(".lock")):
            if not _is_complete(path, num_bytes):  # not written by another process in the meantime
                logger.warning("unpacking images once to %s (%.1f GB)", path, num_bytes / 1e9)
                write_npy(path, shape, blocks)
    return path


def _is_complete(path: Path, num_bytes: int) -> bool:
    return path.exists() and path.stat().st_size > num_bytes
