"""dSprites: white shapes on black (Matthey et al., 2017).

Layout of ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``: ``imgs`` (737280, 64, 64) uint8 of 0 and 1, and
``latents_classes`` (737280, 6) int64: colour, shape, scale, orientation, x, y.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.image_sources import ImageArray
from ldm.data.places import find_source
from ldm.data.rows import npz_blocks
from ldm.util import UserError

_NAME = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"
_PLACES = tuple(
    f"{folder}{name}{suffix}"
    for suffix in (".npy", ".h5", ".npz")
    for folder in ("", "dsprites/")
    for name in (_NAME, "dsprites")
)


def open_source(path: str | os.PathLike | None = None) -> ImageArray:
    """The sprites, 0 and 255.

    Raises:
        UserError: file missing, damaged, of another layout or in another order.
    """
    next_step = f"download {_NAME}.npz (github.com/google-deepmind/dsprites-dataset)"
    found = find_source("dSprites", path, _PLACES, next_step)
    if found.suffix != ".npz":  # converted: bytes of 0 and 255
        return ImageArray(found, channels=1)
    _check_classes(found, factor_space("dsprites"))
    return ImageArray(found, key="imgs", channels=1, scale=255)


def _check_classes(path: Path, space: FactorSpace) -> None:
    """The file's own factor values are those that the place of each image stands for."""
    start = 0
    for block in npz_blocks(path, "latents_classes"):
        if block.ndim != 2 or block.shape[1] != len(space.all_sizes):
            raise UserError(
                f"{path}: 'latents_classes' is (N, {', '.join(map(str, block.shape[1:]))}), expected (N, "
                f"{len(space.all_sizes)}): {', '.join(space.all_names)}; download it again"
            )
        try:
            expected = np.arange(start, start + len(block))
            wrong = np.flatnonzero(space.index_of(block) != expected)
        except ValueError as err:
            raise UserError(f"{path}: 'latents_classes' do not fit the factors ({err}); download it again") from err
        if len(wrong):
            raise UserError(
                f"{path}: image {start + wrong[0]} has the factors {block[wrong[0]].tolist()}, which "
                f"belong in row {space.index_of(block[wrong[:1]])[0]}; download it again"
            )
        start += len(block)


class DSprites(StoredFactors):
    """dSprites in three equal channels (see ``FactorDataset`` for what an item holds and for the other options).

    The factors to be recovered are shape, scale, orientation, x and y; the colour has one value. The compressed file
    is unpacked once (3 GB), to the cache or, with ``scripts/dataset.py convert``, to a file of one's own.

    Args:
        path: the .npz, .npy or .h5 file or its folder; None takes the folder in the variable ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: file missing, damaged, or of another layout or number of images.
    """

    def __init__(self, path: str | os.PathLike | None = None, size: int = 64, **options: Any) -> None:
        super().__init__(space=factor_space("dsprites"), source=open_source(path), size=size, **options)
