"""FFHQ and LSUN from LMDBs of 256-pixel images, in the layout of Diffusion Autoencoders and EncDiff."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm.data.formats.lmdb_text import LMDBImages, find_lmdb
from ldm.data.options import require_choice, require_count
from ldm.data.paths import AnyPath
from ldm.ranges import OptionalCount, Size
from ldm.util import ConfigError

FFHQ_TEST = 10_000
_FFHQ_VALIDATION = 1_000
CATEGORIES = ("bedroom", "horse", "church")


class FFHQ(LMDBImages):
    """FFHQ faces (see ``LMDBImages`` for further options).

    Args:
        path: the LMDB or a folder above it; None takes ``DATA_ROOT``.
        split: "train" is all but the first 10,000, "test" the first 10,000, "validation" 1,000 of these, null all.
    """

    _candidates = ("ffhq256.lmdb", "ffhq.lmdb", "ffhq/ffhq256.lmdb", "ffhq")
    _path_variable = ""

    def __init__(
        self,
        path: AnyPath | None = None,
        image_size: Size = 256,
        original_resolution: Size | None = 256,
        zfill: OptionalCount = 5,
        split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, image_size, original_resolution, zfill=zfill, split=split, **options)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        size = len(self.reader)
        rows = {
            "train": range(FFHQ_TEST, size),
            "validation": range(min(_FFHQ_VALIDATION, size)),
            "test": range(min(FFHQ_TEST, size)),
            None: range(size),
        }
        require_choice("split", split, rows)
        require_count("limit", limit, or_null=True)
        if not rows[split]:
            raise ConfigError(
                f"split: {split} of FFHQ starts at image {FFHQ_TEST}, but the LMDB has only {size}. Use split: null."
            )
        return self.without_skipped(np.array(rows[split])[:limit])


class LSUN(LMDBImages):
    """LSUN bedrooms, horses or churches (see ``LMDBImages`` for further options).

    Args:
        path: the LMDB or a folder above it; None takes ``DATA_ROOT``.
        category: "bedroom", "horse" or "church", which selects the LMDB in a folder.
        do_augment: mirror half of the images at random; None does so for horses, as in the reference.

    Raises:
        ConfigError: the category is unknown.
    """

    def __init__(
        self,
        path: AnyPath | None = None,
        category: str = "bedroom",
        image_size: Size = 128,
        original_resolution: Size | None = 256,
        do_augment: bool | None = None,
        **options: Any,
    ) -> None:
        require_choice("category", category, CATEGORIES)
        candidates = [f"{folder}{name}.lmdb" for folder in ("", "lsun/") for name in (f"{category}256", category)]
        found = find_lmdb(f"LSUN {category}", path, candidates)
        mirror = category == "horse" if do_augment is None else do_augment
        super().__init__(found, image_size, original_resolution, do_augment=mirror, **options)
