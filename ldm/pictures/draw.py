"""Sheets of images and captioned grids as PNG files."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.pictures.captions import fit_captions
from ldm.pictures.grid import CaptionedGrid
from ldm.util import atomic_write

logger = logging.getLogger(__name__)

MARGIN, GAP, GROUP_GAP = 16, 4, 10  # pixels: around the picture, between images, between captions and images
BACKGROUND, INK, FAINT_INK = (255, 255, 255), (34, 34, 34), (96, 96, 96)
NOT_A_NUMBER = (255, 0, 255)  # color of NaN pixels, rare in images


def to_pixels(images: Tensor) -> np.ndarray:
    """Convert images (N, 3, H, W) or (N, 1, H, W) in [-1, 1] to (N, H, W, 3) uint8.

    Other values are clipped, and NaN becomes magenta.

    Raises:
        ValueError: another shape, or an empty batch.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape) == 0:
        raise ValueError(f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}")
    values = images.detach().to("cpu", torch.float32).expand(-1, 3, -1, -1)
    values = rearrange(values, "n c h w -> n h w c")
    pixels = values.add(1).mul(127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8).numpy()
    bad = values.isnan().any(dim=-1).numpy()
    if bad.any():
        logger.warning("%.1f %% of the pixels are NaN; they are drawn in magenta", 100 * bad.mean())
        pixels = np.where(bad[..., None], np.array(NOT_A_NUMBER, np.uint8), pixels)
    return pixels


def enlarge(images: Tensor, min_side: int) -> np.ndarray:
    """Enlarge images by the smallest whole factor s that gives their shorter side ``min_side`` pixels or more.

    The images are (N, 3, H, W) float in [-1, 1], and the result is (N, s*H, s*W, 3) uint8.
    """
    pixels = to_pixels(images)
    factor = max(1, math.ceil(min_side / min(pixels.shape[1:3])))
    return repeat(pixels, "n h w c -> n (h y) (w x) c", y=factor, x=factor)


def draw_images(images: Tensor, title: str = "", columns: int = 8, min_side: int = 96) -> Image.Image:
    """Draw images (N, 3, H, W) in [-1, 1], ``columns`` in each row, below a title, as an RGB picture.

    ``min_side`` is explained in :func:`enlarge`.

    Raises:
        ValueError: ``images`` has another shape, or ``columns`` is not positive.
    """
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    columns = min(columns, len(images)) or 1
    rows = [""] * math.ceil(len(images) / columns)
    return _compose(enlarge(images, min_side), rows, [""] * columns, title)


def draw_grid(grid: CaptionedGrid, min_side: int = 96) -> Image.Image:
    """Draw a grid with its row captions at the left, column captions on top and the title above.

    Long captions are wrapped, then drawn in a smaller font, then given more space; they are never cut off.

    The result is an RGB picture; ``min_side`` is explained in :func:`enlarge`.

    Raises:
        ValueError: the number of images does not match the captions.
    """
    count, rows, columns = len(grid.images), list(grid.rows), list(grid.columns)
    num_rows = len(rows) or count // max(1, len(columns))
    num_columns = len(columns) or count // max(1, num_rows)
    if count == 0 or num_rows * num_columns != count:
        raise ValueError(
            f"grid {grid.title!r}: expected rows x columns images, got {count} images, {len(rows)} row captions and "
            f"{len(columns)} column captions"
        )
    rows, columns = rows or [""] * num_rows, columns or [""] * num_columns
    return _compose(enlarge(grid.images, min_side), rows, columns, grid.title)


def _compose(pixels: np.ndarray, rows: list[str], columns: list[str], title: str) -> Image.Image:
    """Draw (N, H, W, 3) uint8 images and captions; the last row may have fewer images."""
    cell_height, cell_width = pixels.shape[1:3]
    largest = min(22, max(11, cell_width // 8))
    left = fit_captions(rows, 1.5 * cell_width, cell_height, largest)
    top = fit_captions(columns, cell_width, cell_height, largest)
    left_width = left.widest + GROUP_GAP if any(rows) else 0
    top_height = top.tallest + GROUP_GAP if any(columns) else 0
    pitch_x, pitch_y = max(cell_width, top.widest) + GAP, max(cell_height, left.tallest) + GAP
    content_width = max(left_width + len(columns) * pitch_x - GAP, 160 if title else 0)
    head = fit_captions([title], content_width, 3 * largest, largest + 2, bold=True)
    head_height = head.tallest + GROUP_GAP if title else 0

    size = (content_width + 2 * MARGIN, head_height + top_height + len(rows) * pitch_y - GAP + 2 * MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    head.write(pen, 0, (MARGIN, MARGIN + head.tallest / 2), "lm", INK)
    x0, y0 = MARGIN + left_width, MARGIN + head_height + top_height
    for column in range(len(columns)):  # captions end just above their images
        middle = (x0 + column * pitch_x + cell_width / 2, y0 - GROUP_GAP - top.height(column) / 2)
        top.write(pen, column, middle, "mm", FAINT_INK)
    for row in range(len(rows)):
        left.write(pen, row, (x0 - GROUP_GAP, y0 + row * pitch_y + cell_height / 2), "rm", INK)
    for index, image in enumerate(pixels):
        row, column = divmod(index, len(columns))
        sheet.paste(Image.fromarray(image), (x0 + column * pitch_x, y0 + row * pitch_y))
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write a picture as PNG in one step and return the path; folders are created."""
    with atomic_write(path, "wb") as stream:
        image.save(stream, format="PNG")
    return Path(path)
