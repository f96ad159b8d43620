"""SmallNORB: photographs of 50 toys (LeCun et al., 2004).

Layout: three files per part (training, testing). Each begins with int32 numbers: a magic number for the type, the
number of dimensions, and the dimensions (at least three). ``dat`` (24300, 2, 96, 96) uint8 contains the images of two
cameras, ``cat`` (24300) int32 the category, ``info`` (24300, 4) int32 instance, elevation, azimuth (twice its number)
and lighting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.factors.words import factor_words
from ldm.data.formats.image_sources import ImageArray, ImageSource
from ldm.data.paths import AnyPath, array_names, find_source
from ldm.data.rows import halve
from ldm.ranges import Size
from ldm.util import UserError

PARTS = ("5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing")
_DTYPES = {507333717: np.uint8, 507333716: np.int32, 507333713: np.float32, 507333715: np.float64}
_CANDIDATES = (*array_names(["smallnorb"], ["", "small_norb/", "smallnorb/"]), "small_norb", "smallnorb")
_NEXT_STEP = "download its six .mat.gz files (cs.nyu.edu/~ylclab/data/norb-v1.0-small) and unpack them there"


def file_of(folder: Path, part: str, kind: str) -> Path:
    """Return the path of the "dat", "cat" or "info" file of a part."""
    return folder / f"smallnorb-{part}-{kind}.mat"


def open_source(path: AnyPath | None = None) -> ImageSource:
    """Return the images of camera 0, 64 x 64 grey, in the order of the factors."""
    found = find_source(
        "SmallNORB", path, _CANDIDATES, _NEXT_STEP, lambda p: p.is_file() or file_of(p, PARTS[0], "dat").is_file()
    )
    return ImageArray(found, channels=1) if found.is_file() else NorbFiles(found)


def read_matrix(path: Path) -> np.ndarray:
    """Map one of the binary files; raise a ``UserError`` if it is missing or damaged."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 2)
        if len(header) < 2 or int(header[0]) not in _DTYPES:
            raise UserError(
                f"{path}: expected one of the magic numbers {list(_DTYPES)} at the start, got {header.tolist()}. "
                "Unpack the file again."
            )
        dtype, ndim = np.dtype(_DTYPES[int(header[0])]), int(header[1])
        written = max(3, ndim)
        shape = tuple(np.fromfile(path, "<i4", written, offset=8)[:ndim].tolist())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). To replace it, {_NEXT_STEP}.") from error
    offset = 8 + 4 * written
    expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(shape) != ndim or size != expected:
        raise UserError(
            f"{path}: expected {expected} bytes for {shape} {dtype}, got {size}. It may be truncated: unpack it again."
        )
    return np.memmap(path, dtype, "r", offset, shape)


class NorbFiles(ImageSource):
    """The six binary files of SmallNORB in a folder; images are resized when they are read."""

    def __init__(self, folder: Path) -> None:
        self.path, self.shape = folder, (64, 64, 1)
        space = factor_space("smallnorb")
        self._parts, features = [], []
        for part in PARTS:
            pixels, category, info = (read_matrix(file_of(folder, part, kind)) for kind in ("dat", "cat", "info"))
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 2:
                raise UserError(
                    f"{file_of(folder, part, 'dat')}: expected (N, 2, H, W) uint8, got {pixels.shape} {pixels.dtype}. "
                    "Unpack it again."
                )
            if len(category) != len(pixels) or info.shape != (len(pixels), 4):
                raise UserError(
                    f"{folder}: expected {len(pixels)} categories and ({len(pixels)}, 4) factor values for the images "
                    f"of {part}, got {len(category)} and {info.shape}. Unpack all files again."
                )
            self._parts.append(pixels)
            features.append(np.column_stack((category, info)))
        self.count = sum(len(pixels) for pixels in self._parts)
        self._positions = _positions(folder, space, np.concatenate(features))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See ``ImageSource``; (n, 64, 64, 1) or, halved, (n, 32, 32, 1)."""
        first = len(self._parts[0])
        pixels = np.empty((len(rows), *self.shape), np.uint8)
        for i, position in enumerate(self._positions[rows].tolist()):
            image = self._parts[0][position, 0] if position < first else self._parts[1][position - first, 0]
            pixels[i, :, :, 0] = Image.fromarray(image).resize(self.shape[:2], Image.Resampling.LANCZOS)
        return halve(pixels) if self._halved else pixels


def _positions(folder: Path, space: FactorSpace, features: np.ndarray) -> np.ndarray:
    """Return the position in the files, training before testing, of each row of the space: (space.size,) int64.

    ``features`` are (N, 5) int: category, instance, elevation, azimuth (twice its number), lighting.
    """
    features = features.astype(np.int64)
    features[:, 3] //= 2
    try:
        rows = space.index_of(features)
    except ValueError as error:
        raise UserError(f"{folder}: the factor values are out of range ({error}). Unpack all files again.") from error
    counts = np.bincount(rows, minlength=space.size)
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        raise UserError(
            f"{folder}: expected one image of each of {space.size} combinations of {', '.join(space.all_names)}, got "
            f"{len(features)} images, {counts[wrong[0]]} of combination {wrong[0]}. Unpack all files again."
        )
    return np.argsort(rows, kind="stable")


class SmallNORB(StoredFactors):
    """SmallNORB in three equal channels (see ``FactorDataset`` for items and further options).

    Rows are sorted by category, instance, elevation, azimuth and lighting. The instance is not a latent factor:
    metrics draw it at random.

    Args:
        path: folder of the six .mat files, a converted .npy or .h5, or a folder above; None takes ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: files are missing or damaged, or their layout is wrong.
    """

    def __init__(self, path: AnyPath | None = None, size: Size = 64, **options: Any) -> None:
        space, vocabulary = factor_space("smallnorb"), factor_words("smallnorb")
        super().__init__(space=space, source=open_source(path), size=size, vocabulary=vocabulary, **options)
