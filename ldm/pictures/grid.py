"""What a model hands out to be looked at: images with the words that belong on their axes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CaptionedGrid(NamedTuple):
    """Images in row-major order with a caption for each row and column.

    Attributes:
        images: (rows * columns, 3, H, W) float in [-1, 1].
        rows: caption of each row, top to bottom.
        columns: caption of each column, left to right; empty for none.
        title: one line above the grid.
    """

    images: Tensor
    rows: list[str]
    columns: list[str]
    title: str = ""
