"""CelebA from an LMDB of its aligned images, in the layout of Diffusion Autoencoders and DisDiff."""

from __future__ import annotations

from typing import Any

from ldm.data.formats.lmdb_text import LMDBImages
from ldm.data.paths import AnyPath
from ldm.ranges import Size


class CelebA(LMDBImages):
    """CelebA faces.

    An LMDB of the unresized 178 x 218 images has keys with ``None-0000000`` (``original_resolution: null``); then
    ``crop_d2c`` cuts out the 128 x 128 face window. Images of an LMDB that was written at 128 pixels are already cut:
    ``original_resolution: 128, crop_d2c: false``.

    Args:
        path: the LMDB or a folder above it; None takes ``DATA_ROOT``. For further options see ``LMDBImages``.
    """

    _candidates = ("celeba.lmdb", "celeba/celeba.lmdb", "celeba/train-images.lmdb", "celeba")
    _path_variable = ""

    def __init__(
        self,
        path: AnyPath | None = None,
        original_resolution: Size | None = None,
        crop_d2c: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(path, original_resolution=original_resolution, crop_d2c=crop_d2c, **options)
