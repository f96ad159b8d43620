"""Cars3D: renderings of 183 cars from 4 x 24 directions (Reed et al., 2015).

Layout: 183 files .mat, each with ``im`` (128, 128, 3, 24, 4) uint8: height, width, channel, azimuth, elevation. A
file's place in the sorted listing is the number of its car.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.factors import factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.image_sources import CachedSource, ImageArray, ImageSource
from ldm.data.places import find_source
from ldm.data.rows import BLOCK
from ldm.util import UserError

_MAT_SHAPE = (128, 128, 3, 24, 4)
_FOLDERS = ("cars", "cars3d", "nips2015-analogy-data/data/cars", "data/cars")
_FILES = ("cars3d.npy", "cars/cars3d.npy", "cars3d/cars3d.npy", "cars3d.h5", "cars/cars3d.h5", "cars3d/cars3d.h5")
_NEXT_STEP = "download its archive (www.scottreed.info, nips2015-analogy-data) and unpack it there"


def _holds_meshes(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.mat"))


def open_source(path: str | os.PathLike | None = None) -> ImageSource:
    """The pictures of all cars, 64 x 64, in the order of the factors.

    Raises:
        UserError: neither .mat files nor a converted file, or another number of cars.
    """
    found = find_source("Cars3D", path, (*_FILES, *_FOLDERS), _NEXT_STEP, lambda p: p.is_file() or _holds_meshes(p))
    return ImageArray(found) if found.is_file() else CarMeshes(found)


class CarMeshes(CachedSource):
    """The .mat files of Cars3D. Decoding one takes as long as all its 96 pictures, so they are unpacked once.

    Args:
        folder: of the files.

    Raises:
        UserError: another number of files than there are cars.
    """

    def __init__(self, folder: Path) -> None:
        self.space = factor_space("cars3d")
        self._files = sorted(folder.glob("*.mat"))
        cars = self.space.all_sizes[2]
        if len(self._files) != cars:
            raise UserError(f"{folder} holds {len(self._files)} .mat files, expected {cars}, one per car; {_NEXT_STEP}")
        super().__init__(folder, self._files, self.space.size, (64, 64, 3), is_slow=True)

    def blocks(self) -> Iterator[np.ndarray]:
        """All pictures in the order of the factors; they are held in memory (0.2 GB), since the cars turn fastest."""
        pictures = np.empty((*self.space.all_sizes, *self.shape), np.uint8)
        for number, file in enumerate(self._files):
            pictures[:, :, number] = _car(file)
        flat = pictures.reshape(self.count, *self.shape)
        yield from (flat[start : start + BLOCK] for start in range(0, self.count, BLOCK))


def _car(file: Path) -> np.ndarray:
    """The pictures of one car: (4 elevations, 24 azimuths, 64, 64, 3) uint8."""
    from scipy.io import loadmat  # takes a while to import

    try:
        content = loadmat(file, variable_names=["im"])
    except (OSError, ValueError, TypeError, NotImplementedError, zlib.error, EOFError) as err:
        raise UserError(
            f"{file} cannot be read as .mat ({err}); unpack the archive of Cars3D again, it may be truncated"
        ) from err
    if "im" not in content:
        raise UserError(f"{file} has no 'im'; expected {_MAT_SHAPE} uint8. Unpack the archive of Cars3D again")
    pictures = content["im"]
    if pictures.shape != _MAT_SHAPE or pictures.dtype != np.uint8:
        raise UserError(
            f"{file}: 'im' is {pictures.shape} {pictures.dtype}, expected {_MAT_SHAPE} uint8; unpack the "
            "archive of Cars3D again"
        )
    small = [
        Image.fromarray(picture).resize((64, 64), Image.Resampling.LANCZOS)
        for picture in pictures.transpose(4, 3, 0, 1, 2).reshape(-1, *_MAT_SHAPE[:3])
    ]
    return np.stack([np.asarray(picture) for picture in small]).reshape(4, 24, 64, 64, 3)


class Cars3D(StoredFactors):
    """Cars3D (see ``FactorDataset`` for what an item holds and for the other options).

    The references train on every picture ten times per epoch (``repeat: 10``) and test without repeats; so do the
    shipped configs.

    Args:
        path: folder of the .mat files, a converted .npy or .h5, or a folder above; None takes the folder in the
            variable ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: files missing, damaged, or of another layout or number.
    """

    def __init__(self, path: str | os.PathLike | None = None, size: int = 64, **options: Any) -> None:
        super().__init__(space=factor_space("cars3d"), source=open_source(path), size=size, **options)
