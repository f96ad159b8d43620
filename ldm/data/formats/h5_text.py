"""Images in array files, and images with attribute texts in HDF5 for machines without the package lmdb.

Layout of the latter: ``images`` (N, R, R, 3) uint8, ``texts`` (N) UTF-8 strings, attributes joined by ``|``, and
``length`` among the attributes of the file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.dataset import ImageDataset, split_rows
from ldm.data.formats.image_sources import ImageArray
from ldm.data.formats.picture_files import square, to_array
from ldm.data.formats.texts import StoredTexts
from ldm.data.options import require_count
from ldm.data.paths import AnyPath, find_source
from ldm.data.rows import h5_array
from ldm.ranges import PositiveInt, Size
from ldm.util import UserError

_NEXT_STEP = "write it with 'python scripts/dataset.py write'"


class ArrayImages(ImageDataset):
    """Images of an array file, without texts or factors: .npy, .npz or HDF5, channels first or last.

    Args:
        path: the file.
        key: name of the array in an .npz or HDF5 file.
        image_size: side of the images in pixels: the shorter side is resized and the centre cut out. None keeps the
            size of the file.
        split, limit: see ``split_rows``.
        do_augment, seed, repeat, augment: see ``ImageDataset``.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: the file or array is missing or truncated, or its type or shape is wrong.
    """

    def __init__(
        self,
        path: AnyPath,
        key: str = "images",
        image_size: Size | None = 64,
        split: str | None = None,
        limit: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        require_count("image_size", image_size, or_null=True)
        self.path = find_source(type(self).__name__, path, (), _NEXT_STEP)
        self._source = ImageArray(self.path, key, size=None)
        self._source.prepare()
        self.image_size = image_size
        super().__init__(self.rows_of(split, limit), **options)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        return split_rows(self._source.count, split, limit)

    def original(self, row: int) -> np.ndarray:
        return self._source.read(np.array([row]))[0]

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by row: (n,) int -> (n, image_size, image_size, 3) uint8."""
        pixels = self._source.read(rows)
        if self.image_size is None or pixels.shape[1:3] == (self.image_size, self.image_size):
            return pixels
        return np.stack([to_array(square(Image.fromarray(image), self.image_size)) for image in pixels])


class H5TextImages(StoredTexts, ArrayImages):
    """Images of an HDF5 file with attribute texts: ``ArrayImages`` and the entries of ``StoredTexts``.

    Args:
        path: the file; None takes example.h5 in ``DATA_ROOT``.
        options: see ``StoredTexts`` and ``ArrayImages``.

    Raises:
        UserError: the file has no texts, is truncated, or has another number of attributes.
    """

    def __init__(self, path: AnyPath | None = None, **options: Any) -> None:
        super().__init__(path=find_source("H5TextImages", path, ("example.h5",), _NEXT_STEP), **options)

    @functools.cached_property
    def _texts(self) -> list[str]:
        return _read_texts(self.path, self._source.count)

    def joined_texts(self, index: int) -> str:
        return self._texts[index]

    def all_joined_texts(self) -> list[str]:
        return self._texts


def _read_texts(path: Path, count: int) -> list[str]:
    array = h5_array(path, "texts")
    with array.file as file:
        length = file.attrs.get("length", count)
        if length != count:
            raise UserError(f"{path}: expected {length} images (attribute 'length'), got {count}. Write it again.")
        if array.shape != (count,):
            raise UserError(
                f"{path}: expected 'texts' of shape ({count},), one string per image; got {array.shape}. Write the "
                "file again."
            )
        try:
            return list(array.asstr()[:])
        except (TypeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: expected 'texts' as UTF-8 strings, but decoding failed ({error}). Write the file again."
            ) from error
