"""Pictures, with or without attribute texts, in an LMDB.

Keys: ``length`` (a number in ASCII); ``img-<resolution>-<index>`` an encoded picture (older sets: without
``img-``); ``txt-<resolution>-<index>`` its attributes in UTF-8, joined by ``|``. Indices have seven digits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dataset import ImageDataset, check_unset_prob, leave_unset, split_rows
from ldm.data.formats.lmdb_reader import LMDBReader, is_lmdb
from ldm.data.formats.picture_files import crop_face, decode_picture, square, to_array
from ldm.data.formats.text_writers import SEPARATOR
from ldm.data.places import data_root, find_source
from ldm.util import ConfigError, UserError

_DEFAULT = "example.lmdb"


def find_lmdb(name: str, path: str | os.PathLike | None, places: Sequence[str]) -> Path:
    """The LMDB: ``path``, or in its place that of a folder above it or below ``DATA_ROOT``.

    Raises:
        UserError: nowhere found.
    """
    return find_source(name, path, places, "or write one with 'python scripts/dataset.py write'", is_lmdb)


class LMDBImages(ImageDataset):
    """Pictures of an LMDB, without text: the target for first stages on one's own pictures.

    Args:
        path: the LMDB; None takes the environment variable ``DB_PATH``, else example.lmdb in the folder in the
            variable ``DATA_ROOT``.
        image_size: side of the images in pixels: shorter side resized, centre cut out.
        original_resolution: as in the keys; null for keys that say ``None``.
        crop_d2c: cut the CelebA face window first (only for unresized 178 x 218 pictures).
        zfill: digits of the index in the keys.
        split: null (all), train, validation or test; see ``split_rows``.
        limit: see ``split_rows``.
        do_augment: mirror half of the images, at random.
        seed: of the mirroring.

    Raises:
        UserError: no LMDB, a missing key or a damaged picture, named.
    """

    _prefixes: tuple[str, ...] = ("", "img-")
    _places: tuple[str, ...] = (_DEFAULT,)

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 64,
        original_resolution: int | None = 128,
        crop_d2c: bool = False,
        zfill: int = 7,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
        seed: int = 0,
    ) -> None:
        if image_size < 1:
            raise ConfigError(f"image_size must be a number of pixels, found {image_size}")
        self.reader = LMDBReader(self._find(path), original_resolution, zfill)
        self.image_size, self.crop_d2c = image_size, crop_d2c
        super().__init__(self._split(len(self.reader), split, limit), do_augment=do_augment, seed=seed)

    @classmethod
    def _find(cls, path: str | os.PathLike | None) -> Path:
        return find_lmdb(cls.__name__, path or os.environ.get("DB_PATH") or data_root() / _DEFAULT, cls._places)

    @staticmethod
    def _split(size: int, split: str | None, limit: int | None) -> np.ndarray:
        return split_rows(size, split, limit)

    def picture(self, index: int) -> np.ndarray:
        """Image ``index``: (image_size, image_size, 3) uint8."""
        keys = [prefix + self.reader.name(index) for prefix in self._prefixes]
        name = f"{self.reader.path}: picture {keys[0]!r}"
        picture = decode_picture(self.reader.require(*keys), name)
        if self.crop_d2c:
            picture = crop_face(picture, name)
        return to_array(square(picture, self.image_size))

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images by index: (n,) int -> (n, image_size, image_size, 3) uint8."""
        return np.stack([self.picture(row) for row in rows.tolist()])


class LMDBTextImages(LMDBImages):
    """Pictures with attribute texts: ``LMDBImages`` and ``text``, U strings per image.

    Args:
        num_attributes: U, which must be the model's number of units; None takes that of the first picture.
        unset_prob: probability that a text is left empty, unit by unit.
        seed: of that choice, which depends on it and on the indices of the batch alone.

    Raises:
        UserError: a picture with another number of attributes, or texts that are not UTF-8.
    """

    _prefixes = ("img-", "")

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 64,
        original_resolution: int | None = 128,
        crop_d2c: bool = False,
        zfill: int = 7,
        num_attributes: int | None = None,
        unset_prob: float = 0.0,
        seed: int = 0,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
    ) -> None:
        super().__init__(path, image_size, original_resolution, crop_d2c, zfill, split, limit, do_augment, seed)
        check_unset_prob(unset_prob)
        self.unset_prob, self.num_attributes = unset_prob, num_attributes
        if len(self):
            self.num_attributes = len(self.texts(0))  # a wrong number is told at once, not after hours

    def texts(self, index: int) -> list[str]:
        """The U attribute texts of image ``index``."""
        key = f"txt-{self.reader.name(index)}"
        try:
            text = self.reader.require(key).decode("utf-8")
        except UnicodeDecodeError as err:
            raise UserError(f"{self.reader.path}: key {key!r} is not UTF-8 ({err}); write it anew") from err
        return split_texts(text, self.num_attributes, f"{self.reader.path}: picture {index}")

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Texts of rows, some of them left unset."""
        texts = [self.texts(row) for row in rows.tolist()]
        return {"text": leave_unset(texts, self.unset_prob, np.random.default_rng([self.seed, *rows.tolist()]))}


def split_texts(text: str, num_attributes: int | None, name: str) -> list[str]:
    """The U attributes of a picture, which stand joined by ``|``.

    Raises:
        UserError: another number of them than ``num_attributes``, where that is known.
    """
    texts = text.split(SEPARATOR)
    if num_attributes not in (None, len(texts)):
        raise UserError(
            f"{name} has {len(texts)} attributes ({text!r}), expected {num_attributes}; set num_attributes "
            "and the model's latent_unit to the number written, or write the set anew (leave unknown ones "
            "empty)"
        )
    return texts
