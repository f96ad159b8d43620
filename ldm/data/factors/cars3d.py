"""Cars3D: renderings of 183 cars from 4 x 24 directions (Reed et al., 2015).

Layout: 183 .mat files, each with ``im`` (128, 128, 3, 24, 4) uint8: height, width, channel, azimuth, elevation. The
position of a file in the sorted listing is the number of its car.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from ldm.data.factors import factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.factors.words import factor_words
from ldm.data.formats.image_sources import CachedSource, ImageArray, ImageSource
from ldm.data.paths import AnyPath, array_names, find_source
from ldm.data.rows import BLOCK, readable
from ldm.ranges import Size
from ldm.util import UserError

_MAT_SHAPE = (128, 128, 3, 24, 4)
_FOLDERS = ("cars", "cars3d", "nips2015-analogy-data/data/cars", "data/cars")
_FILES = array_names(["cars3d"], ["", "cars/", "cars3d/"])
_NEXT_STEP = "download the archive nips2015-analogy-data (www.scottreed.info) and unpack it there"


def open_source(path: AnyPath | None = None) -> ImageSource:
    """Return the images of all cars, 64 x 64, in the order of the factors."""

    def accept(candidate: Path) -> bool:
        return candidate.is_file() or (candidate.is_dir() and any(candidate.glob("*.mat")))

    found = find_source("Cars3D", path, (*_FILES, *_FOLDERS), _NEXT_STEP, accept)
    return ImageArray(found) if found.is_file() else CarMeshes(found)


class CarMeshes(CachedSource):
    """The .mat files of Cars3D in a folder; unpacked once, because no image can be decoded without 95 others."""

    def __init__(self, folder: Path) -> None:
        self.space = factor_space("cars3d")
        self._files = sorted(folder.glob("*.mat"))
        cars, found = self.space.all_sizes[2], len(self._files)
        if found != cars:
            raise UserError(
                f"{folder}: expected {cars} .mat files, one per car; got {found}. Unpack the archive again."
            )
        super().__init__(folder, self._files, self.space.size, (64, 64, 3), is_slow=True)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all images in the order of the factors; the car varies fastest, so all (0.2 GB) are in memory."""
        pixels = np.empty((*self.space.all_sizes, *self.shape), np.uint8)
        for number, file in enumerate(self._files):
            pixels[:, :, number] = _car(file)
        flat = pixels.reshape(self.count, *self.shape)
        yield from (flat[start : start + BLOCK] for start in range(0, self.count, BLOCK))


def _car(file: Path) -> np.ndarray:
    """Return the images of one car: (4 elevations, 24 azimuths, 64, 64, 3) uint8."""
    from scipy.io import loadmat  # slow to import

    with readable(file, ".mat", TypeError, NotImplementedError):
        pixels = loadmat(file, variable_names=["im"]).get("im", np.empty(0))
    if pixels.shape != _MAT_SHAPE or pixels.dtype != np.uint8:
        raise UserError(
            f"{file}: expected 'im' of shape {_MAT_SHAPE} uint8, got {pixels.shape} {pixels.dtype}. Unpack the "
            "archive of Cars3D again."
        )
    small = [
        np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.LANCZOS))
        for image in rearrange(pixels, "h w c azimuth elevation -> (elevation azimuth) h w c")
    ]
    return rearrange(np.stack(small), "(elevation azimuth) h w c -> elevation azimuth h w c", elevation=4)


class Cars3D(StoredFactors):
    """Cars3D (see ``FactorDataset`` for items and further options).

    The references train on every image ten times per epoch (``repeat: 10``) and test without repeats; so do the
    shipped configs.

    Args:
        path: folder of the .mat files, a converted .npy or .h5, or a folder above; None takes ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: files are missing or damaged, or their layout or number is wrong.
    """

    def __init__(self, path: AnyPath | None = None, size: Size = 64, **options: Any) -> None:
        space, vocabulary = factor_space("cars3d"), factor_words("cars3d")
        super().__init__(space=space, source=open_source(path), size=size, vocabulary=vocabulary, **options)
