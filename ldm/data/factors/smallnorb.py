"""SmallNORB: photographs of 50 toys (LeCun et al., 2004).

Layout: per part (training, testing) three files. Each begins with int32 numbers: a magic number that names the type,
the number of dimensions, and the dimensions (at least three are written). ``dat`` (24300, 2, 96, 96) uint8 holds the
pictures of two cameras, ``cat`` (24300) int32 the category, ``info`` (24300, 4) int32 instance, elevation, azimuth
(twice its number) and lighting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.image_sources import ImageArray, ImageSource
from ldm.data.places import find_source
from ldm.data.rows import halve
from ldm.util import UserError

PARTS = ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing")
_DTYPES = {507333717: np.uint8, 507333716: np.int32, 507333713: np.float32, 507333715: np.float64}
_PLACES = ("smallnorb.npy", "small_norb/smallnorb.npy", "smallnorb/smallnorb.npy", "small_norb", "smallnorb")
_NEXT_STEP = "download its six .mat.gz files (cs.nyu.edu/~ylclab/data/norb-v1.0-small) and unpack them there"


def file_of(folder: Path, part: str, kind: str) -> Path:
    """Path of the "dat", "cat" or "info" file of a part."""
    return folder / f"smallnorb-{part}-{kind}.mat"


def open_source(path: str | os.PathLike | None = None) -> ImageSource:
    """Camera 0 of all toys, 64 x 64 grey, in the order of the factors.

    Raises:
        UserError: files missing, damaged, or not of each combination once.
    """
    found = find_source(
        "SmallNORB", path, _PLACES, _NEXT_STEP, lambda p: p.is_file() or file_of(p, PARTS[0], "dat").is_file()
    )
    return ImageArray(found, channels=1) if found.is_file() else NorbFiles(found)


def read_matrix(path: Path) -> np.ndarray:
    """Map one of the binary files.

    Raises:
        UserError: missing, of an unknown type, or of another length than its head says.
    """
    try:
        size = path.stat().st_size
        head = np.fromfile(path, "<i4", 2)
        if len(head) < 2 or int(head[0]) not in _DTYPES:
            raise UserError(
                f"{path} starts with {head.tolist()}, expected one of the magic numbers {list(_DTYPES)}; "
                "unpack the file anew"
            )
        dtype, ndim = np.dtype(_DTYPES[int(head[0])]), int(head[1])
        written = max(3, ndim)
        shape = tuple(np.fromfile(path, "<i4", written, offset=8)[:ndim].tolist())
    except OSError as err:
        raise UserError(f"{path} cannot be read ({err}); {_NEXT_STEP}") from err
    offset = 8 + 4 * written
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(shape) != ndim or size != expected:
        raise UserError(
            f"{path} has {size} bytes, its head says {expected} ({shape} {dtype}); it may be truncated, unpack it anew"
        )
    return np.memmap(path, dtype, "r", offset, shape)


class NorbFiles(ImageSource):
    """The binary files of SmallNORB; a picture is resized when it is read.

    Args:
        folder: of the six files.

    Raises:
        UserError: a file missing or damaged, or factor values that are not each combination once.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.shape = folder, (64, 64, 1)
        space = factor_space("smallnorb")
        self._parts, features = [], []
        for part in PARTS:
            pictures, category, info = (read_matrix(file_of(folder, part, kind)) for kind in ("dat", "cat", "info"))
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1] != 2:
                raise UserError(
                    f"{file_of(folder, part, 'dat')} holds {pictures.shape} {pictures.dtype}, expected "
                    "(N, 2, H, W) uint8; unpack it anew"
                )
            if len(category) != len(pictures) or info.shape != (len(pictures), 4):
                raise UserError(
                    f"{folder}: {part} has {len(pictures)} pictures, but {len(category)} categories and "
                    f"{info.shape} factor values; expected as many and 4 each. Unpack all files anew"
                )
            self._parts.append(pictures)
            features.append(np.column_stack((category, info)))
        self.count = sum(len(pictures) for pictures in self._parts)
        self._place = _places(folder, space, np.concatenate(features))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See ``ImageSource``; (n, 64, 64, 1) or, halved, (n, 32, 32, 1)."""
        first = len(self._parts[0])
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        for i, place in enumerate(self._place[rows].tolist()):
            picture = self._parts[0][place, 0] if place < first else self._parts[1][place - first, 0]
            pixels[i, :, :, 0] = Image.fromarray(picture).resize(self.shape[:2], Image.Resampling.LANCZOS)
        return halve(pixels) if self._halved else pixels


def _places(folder: Path, space: FactorSpace, features: np.ndarray) -> np.ndarray:
    """Where the picture of each row of the space lies, training files first: (space.size,) int64.

    Args:
        folder: for the message.
        space: of the factors.
        features: (N, 5) int category, instance, elevation, azimuth (twice its number), lighting.
    """
    features = features.astype(np.int64)
    features[:, 3] //= 2
    try:
        rows = space.index_of(features)
    except ValueError as err:
        raise UserError(f"{folder}: the factor values of SmallNORB do not fit ({err}); unpack all files anew") from err
    counts = np.bincount(rows, minlength=space.size)
    if len(features) != space.size or (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0]) if (counts != 1).any() else 0
        raise UserError(
            f"{folder} holds {len(features)} pictures, expected each of {space.size} combinations of "
            f"{', '.join(space.all_names)} once; combination {row} is there {counts[row]} times. Unpack "
            "all files anew"
        )
    places = np.empty(space.size, dtype=np.int64)
    places[rows] = np.arange(space.size)
    return places


class SmallNORB(StoredFactors):
    """SmallNORB in three equal channels (see ``FactorDataset`` for what an item holds and for the other options).

    Rows are sorted by category, instance, elevation, azimuth and lighting. The instance is not to be recovered: the
    metrics draw it at random.

    Args:
        path: folder of the six .mat files, a converted .npy, or a folder above; None takes the folder in the variable
            ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: files missing, damaged, or of another layout.
    """

    def __init__(self, path: str | os.PathLike | None = None, size: int = 64, **options: Any) -> None:
        super().__init__(space=factor_space("smallnorb"), source=open_source(path), size=size, **options)
