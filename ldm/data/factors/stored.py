"""Data sets with known factors whose images lie on disk, in the order of the factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.data.dataset import FactorDataset
from ldm.data.factors import FactorSpace
from ldm.data.formats.image_sources import ImageSource
from ldm.util import ConfigError, UserError


class StoredFactors(FactorDataset):
    """See ``FactorDataset`` for the other options and for what an item holds.

    Args:
        space: factors of the whole set.
        source: its images: those of all rows of the space, or (``available``) of some values of its factors.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels). Grey images get three equal channels.

    Raises:
        ConfigError: an option outside its choices.
        UserError: another number of images than the factors make.
    """

    def __init__(self, space: FactorSpace, source: ImageSource, size: int = 64, **options: Any) -> None:
        if size not in (32, 64):
            raise ConfigError(f"{type(self).__name__}: size must be 32 or 64 pixels, found {size!r}")
        super().__init__(space=space, **options)
        self._stored = space.restrict({}, self.available).rows if self.available else None
        count = space.size if self._stored is None else len(self._stored)
        if source.count != count:
            sizes = " x ".join(map(str, space.all_sizes))
            raise UserError(
                f"{source.path} holds {source.count} images, but the factors of {type(self).__name__} make "
                f"{count} ({sizes}: {', '.join(space.all_names)}); download it again, or name "
                "another file in path:"
            )
        self.size, self.path, self._source = size, source.path, source
        source.prepare(halved=size == 32)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images of rows of the whole set: (n,) int -> (n, size, size, 3) uint8.

        Raises:
            UserError: rows that are not in the file, or a damaged file.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self._stored is not None:
            places = np.searchsorted(self._stored, rows).clip(max=len(self._stored) - 1)
            absent = rows[self._stored[places] != rows]
            if len(absent):
                raise UserError(
                    f"{self.path} holds {len(self._stored)} of {self.space.size} images; row {absent[0]} "
                    "is not among them"
                )
            rows = places
        pixels = self._source.read(rows)
        return pixels if pixels.shape[-1] == 3 else np.repeat(pixels, 3, axis=-1)
