"""FFHQ and LSUN from LMDBs of 256-pixel pictures, as Diffusion Autoencoders and EncDiff keep them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ldm.data.formats.lmdb_text import LMDBImages, find_lmdb
from ldm.util import ConfigError

FFHQ_TEST = 10_000
_FFHQ_VALIDATION = 1_000
CATEGORIES = ("bedroom", "horse", "church")


class FFHQ(LMDBImages):
    """FFHQ faces (see ``LMDBImages`` for the other options).

    Args:
        path: the LMDB or a folder above it; None takes the folder in the variable ``DATA_ROOT``.
        split: "train" is all but the first 10,000, "test" the first 10,000, "validation" 1,000 of these, null all.
    """

    _places = ("ffhq256.lmdb", "ffhq.lmdb", "ffhq/ffhq256.lmdb", "ffhq")

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 256,
        original_resolution: int | None = 256,
        zfill: int = 5,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(path, image_size, original_resolution, False, zfill, split, limit, do_augment, seed)

    @classmethod
    def _find(cls, path: str | os.PathLike | None) -> Path:
        return find_lmdb("FFHQ", path, cls._places)

    @staticmethod
    def _split(size: int, split: str | None, limit: int | None) -> np.ndarray:
        rows = {
            None: range(size),
            "train": range(FFHQ_TEST, size),
            "test": range(min(FFHQ_TEST, size)),
            "validation": range(min(_FFHQ_VALIDATION, size)),
        }
        if split not in rows:
            raise ConfigError(f"unknown split {split!r} of FFHQ; expected train, validation, test or null (all)")
        if not rows[split]:
            raise ConfigError(
                f"split: {split} of FFHQ begins at picture {FFHQ_TEST}, but the LMDB has only {size}; use split: null"
            )
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"limit must be a whole number of images, at least 1, or null; found {limit!r}")
        return np.array(rows[split])[:limit]


class LSUN(LMDBImages):
    """LSUN bedrooms, horses or churches (see ``LMDBImages`` for the other options).

    Args:
        path: the LMDB or a folder above it; None takes the folder in the variable ``DATA_ROOT``.
        category: "bedroom", "horse" or "church": which LMDB is sought where ``path`` is not one.
        do_augment: mirror half of the images, at random; None does so with horses, as the reference does.

    Raises:
        ConfigError: an unknown category.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        category: str = "bedroom",
        image_size: int = 128,
        original_resolution: int | None = 256,
        zfill: int = 7,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool | None = None,
        seed: int = 0,
    ) -> None:
        if category not in CATEGORIES:
            raise ConfigError(f"unknown category {category!r} of LSUN; known: {', '.join(CATEGORIES)}")
        places = [f"{folder}{name}.lmdb" for folder in ("", "lsun/") for name in (f"{category}256", category)]
        found = find_lmdb(f"LSUN {category}", path, places)
        mirror = category == "horse" if do_augment is None else do_augment
        super().__init__(found, image_size, original_resolution, False, zfill, split, limit, mirror, seed)
