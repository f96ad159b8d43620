"""dSprites: white shapes on black (Matthey et al., 2017).

Layout of ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``: ``imgs`` (737280, 64, 64) uint8 of 0 and 1, and
``latents_classes`` (737280, 6) int64: colour, shape, scale, orientation, x, y.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.factors.words import factor_words
from ldm.data.formats.image_sources import ImageArray
from ldm.data.paths import AnyPath, array_names, find_source
from ldm.data.rows import npz_blocks
from ldm.ranges import Size
from ldm.util import UserError

_NAME = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"
_FILES = array_names([_NAME, "dsprites"], ["", "dsprites/"])


def open_source(path: AnyPath | None = None) -> ImageArray:
    """Return the images, with pixels 0 and 255."""
    found = find_source("dSprites", path, _FILES, f"download {_NAME}.npz (github.com/google-deepmind/dsprites-dataset)")
    if found.suffix != ".npz":  # converted: bytes of 0 and 255
        return ImageArray(found, channels=1)
    _check_classes(found, factor_space("dsprites"))
    return ImageArray(found, key="imgs", channels=1, scale=255)


def _check_classes(path: Path, space: FactorSpace) -> None:
    """Check that the factor values in the file are those of the rows."""
    start = 0
    for block in npz_blocks(path, "latents_classes"):
        if block.ndim != 2 or block.shape[1] != len(space.all_sizes):
            raise UserError(
                f"{path}: expected 'latents_classes' of shape (N, {len(space.all_sizes)}): "
                f"{', '.join(space.all_names)}; got (N, {', '.join(map(str, block.shape[1:]))}). Download it again."
            )
        try:
            rows = space.index_of(block)
        except ValueError as error:
            raise UserError(f"{path}: 'latents_classes' are out of range ({error}). Download it again.") from error
        wrong = np.flatnonzero(rows != np.arange(start, start + len(block)))
        if len(wrong):
            raise UserError(
                f"{path}: expected images in the order of the factors, got {block[wrong[0]].tolist()} of row "
                f"{rows[wrong[0]]} in row {start + wrong[0]}. Download it again."
            )
        start += len(block)


class DSprites(StoredFactors):
    """dSprites in three equal channels (see ``FactorDataset`` for items and further options).

    The latent factors are shape, scale, orientation, x and y; the colour has one value. The compressed file is
    unpacked once (3 GB), to the cache or, with ``scripts/dataset.py convert``, to another file.

    Args:
        path: the .npz, .npy or .h5 file or its folder; None takes ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: the file is missing or damaged, or its layout or number of images is wrong.
    """

    def __init__(self, path: AnyPath | None = None, size: Size = 64, **options: Any) -> None:
        space, vocabulary = factor_space("dsprites"), factor_words("dsprites")
        super().__init__(space=space, source=open_source(path), size=size, vocabulary=vocabulary, **options)
