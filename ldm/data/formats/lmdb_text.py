"""Images in an LMDB, with or without attribute texts.

Keys: ``length`` (a number in ASCII); ``img-<resolution>-<index>``, an encoded image (older sets: without ``img-``);
``txt-<resolution>-<index>``, its attributes in UTF-8, joined by ``|``. Indices have seven digits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dataset import ImageDataset, split_rows
from ldm.data.formats.lmdb_reader import LMDBReader, is_lmdb
from ldm.data.formats.picture_files import crop_face, decode_picture, square, to_array
from ldm.data.formats.texts import StoredTexts
from ldm.data.options import require_count
from ldm.data.paths import AnyPath, find_source
from ldm.util import UserError


def find_lmdb(name: str, path: AnyPath | None, candidates: Sequence[str]) -> Path:
    """Return the LMDB: ``path``, or one of the candidates in that folder or in ``DATA_ROOT``."""
    return find_source(name, path, candidates, "write one with 'python scripts/dataset.py write'", is_lmdb)


class LMDBImages(ImageDataset):
    """Images of an LMDB without texts, for first stages on any images.

    Args:
        path: the LMDB; None takes the environment variable ``DB_PATH``, else example.lmdb in ``DATA_ROOT``.
        image_size: side of the images in pixels: the shorter side is resized and the centre cut out.
        original_resolution: resolution in the keys; null for keys that contain ``None``.
        crop_d2c: cut out the CelebA face window first (only for unresized images of 178 x 218 pixels).
        zfill: number of digits of the index in the keys.
        split, limit: see ``split_rows``.
        do_augment: mirror half of the images at random.
        seed: seed of all random choices.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: there is no LMDB, a key is missing, or an image is damaged.
    """

    _prefixes: tuple[str, ...] = ("", "img-")
    _candidates: tuple[str, ...] = ("example.lmdb",)
    _path_variable = "DB_PATH"

    def __init__(
        self,
        path: AnyPath | None = None,
        image_size: int = 64,
        original_resolution: int | None = 128,
        crop_d2c: bool = False,
        zfill: int = 7,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
        seed: int = 0,
    ) -> None:
        require_count("image_size", image_size)
        self.path = find_lmdb(type(self).__name__, path or os.environ.get(self._path_variable), self._candidates)
        self.reader = LMDBReader(self.path, original_resolution, zfill)
        self.image_size, self.crop_d2c = image_size, crop_d2c
        super().__init__(self._split(len(self.reader), split, limit), do_augment=do_augment, seed=seed)

    @staticmethod
    def _split(size: int, split: str | None, limit: int | None) -> np.ndarray:
        return split_rows(size, split, limit)

    def image(self, index: int) -> np.ndarray:
        """Return image ``index``: (image_size, image_size, 3) uint8."""
        name = f"{self.path}: image {self._prefixes[0] + self.reader.name(index)!r}"
        image = decode_picture(self.original(index), name)
        if self.crop_d2c:
            image = crop_face(image, name)
        return to_array(square(image, self.image_size))

    def original(self, row: int) -> bytes:
        """See ``ImageDataset``."""
        return self.reader.require(*(prefix + self.reader.name(row) for prefix in self._prefixes))

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by index: (n,) int -> (n, image_size, image_size, 3) uint8."""
        return np.stack([self.image(row) for row in rows.tolist()])


class LMDBTextImages(StoredTexts, LMDBImages):
    """Images of an LMDB with attribute texts: ``LMDBImages`` and ``text``, U strings per image.

    Args:
        path: see ``LMDBImages``, also for the further options.
        num_attributes: U, the model's number of units; None takes that of the first image.
        unset_prob: probability with which each text is left empty.

    Raises:
        UserError: an image has another number of attributes, or its texts are not UTF-8.
    """

    _prefixes = ("img-", "")

    def __init__(
        self, path: AnyPath | None = None, num_attributes: int | None = None, unset_prob: float = 0.0, **options: Any
    ) -> None:
        super().__init__(path, **options)
        self.check_texts(num_attributes, unset_prob)

    def joined_texts(self, index: int) -> str:
        """See ``StoredTexts``."""
        key = f"txt-{self.reader.name(index)}"
        try:
            return self.reader.require(key).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: expected UTF-8 text at key {key!r}, but decoding failed ({error}). Write the LMDB again."
            ) from error
