"""Data sets with known factors whose images are stored on disk, in the order of the factors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ldm.data.dataset import FactorDataset
from ldm.data.factors import FactorSpace
from ldm.data.formats.image_sources import ImageSource
from ldm.data.options import require_choice
from ldm.ranges import Size
from ldm.util import UserError


class StoredFactors(FactorDataset):
    """Stored images with known factors (see ``FactorDataset`` for items and further options).

    Args:
        space: factor space of the whole set.
        source: images of all rows of the space, or (``available``) of some values of its factors.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels). Grey images get three equal channels.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: the number of images is not that of the factors.
    """

    def __init__(self, space: FactorSpace, source: ImageSource, size: Size = 64, **options: Any) -> None:
        require_choice("size", size, (32, 64))
        super().__init__(space=space, **options)
        self._stored = space.restrict({}, self.available).rows if self.available else None
        count = space.size if self._stored is None else len(self._stored)
        if source.count != count:
            sizes = " x ".join(map(str, space.all_sizes))
            raise UserError(
                f"{source.path}: expected {count} images for the factors of {type(self).__name__} ({sizes}: "
                f"{', '.join(space.all_names)}), got {source.count}. Download it again, or set path: to another file."
            )
        self.size, self.path, self._source = size, source.path, source
        source.prepare(halved=size == 32)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images of rows of the whole set: (n,) int -> (n, size, size, 3) uint8.

        Raises:
            UserError: a row is not in the file, or the file is damaged.
        """
        return self._read(self._source, rows)

    def original(self, row: int) -> np.ndarray:
        source = copy.copy(self._source)
        source.prepare()  # in the stored size
        return self._read(source, np.array([row]))[0]

    def _read(self, source: ImageSource, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if self._stored is not None:
            positions = np.searchsorted(self._stored, rows).clip(max=len(self._stored) - 1)
            absent = rows[self._stored[positions] != rows]
            if len(absent):
                raise UserError(
                    f"{self.path} contains {len(self._stored)} of {self.space.size} images, and row {absent[0]} is "
                    "not one of them."
                )
            rows = positions
        pixels = source.read(rows)
        return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1)
