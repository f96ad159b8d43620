"""3dshapes from its published file, with texts; and that file written from the embedded world.

Layout of ``3dshapes.h5``: ``images`` (480000, 64, 64, 3) uint8 and ``labels`` (480000, 6) float64, in the order
floor hue, wall hue, object hue (0 to 0.9), scale (0.75 to 1.25), shape (0 to 3), orientation (-30 to 30).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.dataset import FactorDataset
from ldm.data.factors import factor_space
from ldm.data.rows import (
    PerProcess,
    halve,
    image_cache,
    is_slow_layout,
    map_npz_member,
    open_h5,
    read_h5_rows,
)
from ldm.data.vocabulary import world_vocabulary
from ldm.data.world import World3D
from ldm.util import ConfigError, UserError

COUNT = 480_000
IMAGE_SHAPE = (64, 64, 3)
LABEL_VALUES = (
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.linspace(0.75, 1.25, 8),
    np.arange(4.0),
    np.linspace(-30.0, 30.0, 15),
)
_PLACES = ("3dshapes.h5", "shapes3d/3dshapes.h5", "3dshapes.npz", "shapes3d/3dshapes.npz")
_NEXT_STEP = ("download it (github.com/google-deepmind/3d-shapes), write a stand-in with "
              "scripts/export_world.py, or use target: ldm.data.world.World3D")


def labels_of(rows: np.ndarray) -> np.ndarray:
    """Label values of rows as the published file holds them: (n,) int -> (n, 6) float64."""
    factors = factor_space("shapes3d").factors_of(rows)
    return np.stack([values[factors[:, k]] for k, values in enumerate(LABEL_VALUES)], axis=1)


def find_shapes3d(path: str | os.PathLike | None = None) -> Path:
    """The file: ``path`` (a file, or a folder that holds it), else the folder in the variable ``DATA_ROOT``.

    Raises:
        UserError: nowhere found; the message lists where it was sought.
    """
    root = Path(path) if path is not None else Path(os.environ.get("DATA_ROOT") or "data")
    if root.is_file():
        return root
    sought = [root / place for place in _PLACES]
    for candidate in sought:
        if candidate.is_file():
            return candidate
    origin = f"path: {path}" if path is not None else f"DATA_ROOT={os.environ.get('DATA_ROOT') or '(not set)'}"
    raise UserError(f"3dshapes not found ({origin}); sought {', '.join(map(str, sought))}. Set path: or DATA_ROOT "
                    f"to its folder, {_NEXT_STEP}")


def _check_array(path: Path, name: str, found: tuple, dtype: np.dtype, shape: tuple, kind: str) -> None:
    if found == shape and dtype.kind in kind and (kind != "u" or dtype == np.uint8):
        return
    wanted = "uint8" if kind == "u" else "float64"
    hint = " It was exported with --limit; export all." if found[1:] == shape[1:] and found[0] < shape[0] else ""
    raise UserError(f"{path}: '{name}' is {found} {dtype}, expected {shape} {wanted}.{hint} "
                    f"Otherwise {_NEXT_STEP}")


def _open_checked_h5(path: Path) -> h5py.Dataset:
    """``images`` of an HDF5 file whose layout is that of 3dshapes."""
    file = open_h5(path)
    for name, shape, kind in (("images", (COUNT, *IMAGE_SHAPE), "u"), ("labels", (COUNT, 6), "f")):
        if name not in file:
            raise UserError(f"{path} has no '{name}'; found {sorted(file)}. Expected the layout of 3dshapes.h5: "
                            "images and labels")
        _check_array(path, name, file[name].shape, file[name].dtype, shape, kind)
    rows = np.linspace(0, COUNT - 1, 16).astype(np.int64)
    found, expected = read_h5_rows(file["labels"], rows), labels_of(rows)
    if not np.allclose(found, expected, atol=1e-3):
        i = np.abs(found - expected).max(1).argmax()
        raise UserError(f"{path}: labels of image {rows[i]} are {found[i].tolist()}, expected "
                        f"{expected[i].tolist()}; the images are not in the order of 3dshapes")
    return file["images"]


def _open_npz(path: Path) -> np.ndarray | None:
    images = map_npz_member(path, "images")
    if images is not None:
        _check_array(path, "images", images.shape, images.dtype, (COUNT, *IMAGE_SHAPE), "u")
    return images


def _unpacked_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path) as archive:
            images = archive["images"]
    except (OSError, ValueError, EOFError, MemoryError) as err:
        raise UserError(f"{path}: 'images' cannot be unpacked ({err or type(err).__name__}); the file is damaged "
                        "or larger than the memory") from err
    _check_array(path, "images", images.shape, images.dtype, (COUNT, *IMAGE_SHAPE), "u")
    return images


class Shapes3D(FactorDataset):
    """3dshapes (see ``FactorDataset`` for what an item holds and for the other options).

    A stand-in for ``World3D`` by one config line: same factors, words, splits and options. The published file is
    chunked across images; the first use unpacks such a file once to a cache.

    Args:
        path: the .h5 or .npz file or its folder; None takes the folder in the variable ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: file missing, damaged, or of another layout.
    """

    def __init__(self, path: str | os.PathLike | None = None, size: int = 64, **options: Any) -> None:
        if size not in (32, 64):
            raise ConfigError(f"Shapes3D: size must be 32 or 64 pixels, found {size!r}")
        super().__init__(factor_space("shapes3d"), world_vocabulary(), **options)
        self.size = size
        self.path = find_shapes3d(path)
        self._halve = size == 32
        self._images = PerProcess(self._source())

    def _source(self) -> Callable[[], h5py.Dataset | np.ndarray]:
        """How each process opens the images; checks the file, and unpacks it where it is slow."""
        if self.path.suffix == ".npz":
            if _open_npz(self.path) is not None:
                return functools.partial(_open_npz, self.path)
            images = _unpacked_npz(self.path)
        else:
            images = _open_checked_h5(self.path)
            if not is_slow_layout(images):
                images.file.close()
                return functools.partial(_open_checked_h5, self.path)
        shrink = halve if self._halve else np.asarray
        cached = image_cache(self.path, self.size, COUNT, lambda part: shrink(images[part]))
        self._halve = False
        return functools.partial(np.load, cached, mmap_mode="r")

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images of rows of the whole set: (n,) int -> (n, size, size, 3) uint8."""
        source = self._images.get()
        pixels = read_h5_rows(source, rows) if isinstance(source, h5py.Dataset) else np.array(source[rows])
        return halve(pixels) if self._halve else pixels


def write_shapes3d(
    path: str | os.PathLike, limit: int | None = None, on_progress: Callable[[int], None] = lambda done: None
) -> int:
    """Write the embedded world in the layout of ``3dshapes.h5``.

    The file appears under its name only when it is whole. Each image is a chunk of its own, so that
    random ones read quickly.

    Args:
        path: of the file.
        limit: write only the first so many images (such a file is for inspection; ``Shapes3D`` wants them all).
        on_progress: called with the number of images written so far.

    Returns:
        The number of images written.

    Raises:
        ConfigError: limit below 1.
        UserError: the file cannot be written.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, found {limit}")
    target, count = Path(path), min(limit or COUNT, COUNT)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fill_h5(temporary, count, on_progress)
        os.replace(temporary, target)
    except OSError as err:
        raise UserError(f"{target} could not be written ({err}); free some space or choose another place") from err
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _fill_h5(path: Path, count: int, on_progress: Callable[[int], None], block: int = 960) -> None:
    world = World3D(size=64)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (count, *IMAGE_SHAPE), np.uint8, compression="gzip",
                                     chunks=(1, *IMAGE_SHAPE), compression_opts=1)
        file.create_dataset("labels", data=labels_of(np.arange(count)))
        for start in range(0, count, block):
            rows = np.arange(start, min(start + block, count))
            images[rows[0] : rows[-1] + 1] = world.images(rows)
            on_progress(int(rows[-1]) + 1)
