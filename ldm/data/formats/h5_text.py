"""Pictures with attribute texts in HDF5: the twin of the LMDB, for machines without the package lmdb.

Layout: ``images`` (N, R, R, 3) uint8, ``texts`` (N) UTF-8 strings, attributes joined by ``|``, and ``length`` among
the file's own attributes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.dataset import ImageDataset, check_unset_prob, leave_unset, split_rows
from ldm.data.formats.image_sources import ImageArray, h5_array
from ldm.data.formats.lmdb_text import split_texts
from ldm.data.formats.picture_files import square, to_array
from ldm.data.places import find_source
from ldm.data.rows import open_h5
from ldm.util import ConfigError, UserError


class ArrayImages(ImageDataset):
    """Pictures in an array file, without texts or factors: .npy, .npz or HDF5, channels first or last.

    Args:
        path: the file.
        key: name of the array in an .npz or HDF5 file.
        image_size: side of the images in pixels: shorter side resized, centre cut out. None takes them as they are.
        split: null (all), train, validation or test; see ``split_rows``.
        limit: see ``split_rows``.
        do_augment: mirror half of the images, at random.
        seed: of everything random.

    Raises:
        UserError: no such file or array, another type or shape, or a truncated file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        key: str = "images",
        image_size: int | None = 64,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
        seed: int = 0,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise ConfigError(f"image_size must be a number of pixels or null, found {image_size}")
        self.path = find_source(type(self).__name__, path, (), "and write it with 'python scripts/dataset.py write'")
        self._source = ImageArray(self.path, key, size=None)
        self._source.prepare()
        self.image_size = image_size
        super().__init__(split_rows(self._source.count, split, limit), do_augment=do_augment, seed=seed)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images by row: (n,) int -> (n, image_size, image_size, 3) uint8."""
        pixels = self._source.read(rows)
        if self.image_size is None or pixels.shape[1:3] == (self.image_size, self.image_size):
            return pixels
        return np.stack([to_array(square(Image.fromarray(picture), self.image_size)) for picture in pixels])


class H5TextImages(ArrayImages):
    """Pictures with attribute texts: ``ArrayImages`` and ``text``, U strings per image.

    Args:
        path: the file; None takes example.h5 in the folder in the variable ``DATA_ROOT``.
        num_attributes: U, which must be the model's number of units; None takes that of the first picture.
        unset_prob: probability that a text is left empty, unit by unit.
        seed: of everything random; what is left empty depends on it and on the rows of the batch alone.

    Raises:
        UserError: a file without texts, cut off, or with another number of attributes.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int | None = 64,
        num_attributes: int | None = None,
        unset_prob: float = 0.0,
        seed: int = 0,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
    ) -> None:
        found = find_source("H5TextImages", path, ("example.h5",), "or write it with 'python scripts/dataset.py write'")
        super().__init__(found, "images", image_size, split, limit, do_augment, seed)
        check_unset_prob(unset_prob)
        self.unset_prob = unset_prob
        self._texts = _read_texts(found, self._source.count)
        self.num_attributes = num_attributes
        self.num_attributes = len(self.texts(0))  # a wrong number is told at once

    def texts(self, index: int) -> list[str]:
        """The U attribute texts of image ``index``."""
        return split_texts(self._texts[index], self.num_attributes, f"{self.path}: picture {index}")

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Texts of rows, some of them left unset."""
        texts = [self.texts(row) for row in rows.tolist()]
        return {"text": leave_unset(texts, self.unset_prob, np.random.default_rng([self.seed, *rows.tolist()]))}


def _read_texts(path: Path, count: int) -> list[str]:
    with open_h5(path) as file:
        length = file.attrs.get("length", count)
    if length != count:
        raise UserError(f"{path} holds {count} images, but its attribute 'length' says {length}; write it anew")
    array = h5_array(path, "texts")
    with array.file:
        if array.shape != (count,):
            raise UserError(f"{path}: 'texts' is {array.shape}, expected ({count},), a string per image; write it anew")
        try:
            return list(array.asstr()[:])
        except (TypeError, UnicodeDecodeError) as err:
            raise UserError(f"{path}: 'texts' are not UTF-8 strings ({err}); write it anew") from err
