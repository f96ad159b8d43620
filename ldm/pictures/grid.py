"""The grid of images that models return from ``log_images``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CaptionedGrid(NamedTuple):
    """Images in row-major order with a caption for each row and column."""

    images: Tensor  # (rows * columns, 3, H, W) float in [-1, 1]
    rows: list[str]  # caption of each row, top to bottom; empty for none
    columns: list[str]  # caption of each column, left to right; empty for none
    title: str = ""  # one line above the grid
