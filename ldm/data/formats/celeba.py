"""CelebA from an LMDB of its aligned pictures, as Diffusion Autoencoders and DisDiff keep it."""

from __future__ import annotations

import os
from pathlib import Path

from ldm.data.formats.lmdb_text import LMDBImages, find_lmdb


class CelebA(LMDBImages):
    """CelebA faces (see ``LMDBImages`` for all options).

    An LMDB of the unresized 178 x 218 pictures has keys that say ``None-0000000`` (``original_resolution: null``);
    then ``crop_d2c`` cuts the 128 x 128 face window. Pictures of an LMDB that was written at 128 pixels are cut
    already: ``original_resolution: 128, crop_d2c: false``.

    Args:
        path: the LMDB or a folder above it; None takes the folder in the variable ``DATA_ROOT``.
    """

    _places = ("celeba.lmdb", "celeba/celeba.lmdb", "celeba/train-images.lmdb", "celeba")

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        image_size: int = 64,
        original_resolution: int | None = None,
        crop_d2c: bool = True,
        zfill: int = 7,
        split: str | None = None,
        limit: int | None = None,
        do_augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(path, image_size, original_resolution, crop_d2c, zfill, split, limit, do_augment, seed)

    @classmethod
    def _find(cls, path: str | os.PathLike | None) -> Path:
        return find_lmdb("CelebA", path, cls._places)
