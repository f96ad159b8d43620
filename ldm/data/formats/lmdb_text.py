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

from ldm.data.dataset import split_rows
from ldm.data.formats.encoded import EncodedImages
from ldm.data.formats.lmdb_reader import LMDBReader, is_lmdb
from ldm.data.formats.picture_files import crop_face, square, to_array
from ldm.data.formats.texts import StoredTexts
from ldm.data.memory import DecodedImages
from ldm.data.options import require_count
from ldm.data.paths import AnyPath, find_source
from ldm.ranges import OptionalCount, PositiveInt, Size
from ldm.util import UserError


def find_lmdb(name: str, path: AnyPath | None, candidates: Sequence[str]) -> Path:
    """Return the LMDB: ``path``, or one of the candidates in that folder or in ``DATA_ROOT``."""
    return find_source(name, path, candidates, "write one with 'python scripts/dataset.py write'", is_lmdb)


class LMDBImages(EncodedImages):
    """Images of an LMDB without texts, for first stages on any images.

    Args:
        path: the LMDB; None takes the environment variable ``DB_PATH``, else example.lmdb in ``DATA_ROOT``.
        image_size: side of the images in pixels: the shorter side is resized and the centre cut out.
        original_resolution: resolution in the keys; null for keys that contain ``None``.
        crop_d2c: cut out the CelebA face window first (only for unresized images of 178 x 218 pixels).
        zfill: number of digits of the index in the keys.
        split, limit: see ``split_rows``.
        background, max_pixels, white_level, damaged: see ``EncodedImages``.
        do_augment, seed, repeat, augment: see ``ImageDataset``.

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
        image_size: Size = 64,
        original_resolution: Size | None = 128,
        crop_d2c: bool = False,
        zfill: OptionalCount = 7,
        split: str | None = None,
        limit: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        require_count("image_size", image_size)
        self.path = find_lmdb(type(self).__name__, path or os.environ.get(self._path_variable), self._candidates)
        self.reader = LMDBReader(self.path, original_resolution, zfill)
        self.image_size, self.crop_d2c = image_size, crop_d2c
        self._decoded = DecodedImages(len(self.reader), image_size)
        self.in_memory = self._decoded.fits
        super().__init__(rows=self.rows_of(split, limit), **options)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        return self.without_skipped(split_rows(len(self.reader), split, limit))

    def image(self, index: int) -> np.ndarray:
        """Return image ``index``: (image_size, image_size, 3) uint8."""
        image = self.decode(index)
        if self.crop_d2c:
            image = crop_face(image, self.image_name(index))
        return to_array(square(image, self.image_size))

    def image_name(self, row: int) -> str:
        return f"{self.path}: image {self._prefixes[0] + self.reader.name(row)!r}"

    def sources(self) -> list[Path]:
        return [self.path / "data.mdb" if self.path.is_dir() else self.path]

    def encoded(self, row: int) -> bytes:
        return self.reader.require(*(prefix + self.reader.name(row) for prefix in self._prefixes))

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by index: (n,) int -> (n, image_size, image_size, 3) uint8."""
        return self._decoded.read(rows, self.image)


class LMDBTextImages(StoredTexts, LMDBImages):
    """Images of an LMDB with attribute texts: ``LMDBImages`` and the entries of ``StoredTexts``.

    Raises:
        UserError: an image has another number of attributes, or its texts are not UTF-8.
    """

    _prefixes = ("img-", "")

    def joined_texts(self, index: int) -> str:
        return self._decode(self._key(index), self.reader.require(self._key(index)))

    def all_joined_texts(self) -> list[str]:
        keys = [self._key(index) for index in range(len(self.reader))]
        return [self._decode(key, value) for key, value in zip(keys, self.reader.require_all(keys))]

    def _key(self, index: int) -> str:
        return f"txt-{self.reader.name(index)}"

    def _decode(self, key: str, value: bytes) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: expected UTF-8 text at key {key!r}, but decoding failed ({error}). Write the LMDB again."
            ) from error
