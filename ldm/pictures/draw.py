"""Pictures to be looked at: sheets of images, captioned grids and annotated heat maps, written atomically."""

from __future__ import annotations

import functools
import io
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.pictures.grid import CaptionedGrid
from ldm.util import atomic_write

if TYPE_CHECKING:  # matplotlib is slow to import and wanted only when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

log = logging.getLogger(__name__)

MARGIN, GAP, GROUP_GAP = 16, 4, 10  # pixels: around the picture, between images, between words and images
SMALLEST_FONT = 8  # pixels; below this nobody reads, so a caption gets more room instead
BACKGROUND, INK, FAINT_INK = (255, 255, 255), (34, 34, 34), (96, 96, 96)
NOT_A_NUMBER = (255, 0, 255)  # NaN pixels are painted in a colour that cannot be mistaken for content


class Captions(NamedTuple):
    """Captions broken into lines, all in one font."""

    lines: list[list[str]]
    font: ImageFont.FreeTypeFont

    @property
    def line_height(self) -> int:
        """Distance between base lines in pixels."""
        return math.ceil(self.font.size * 1.25)

    def height(self, index: int) -> int:
        """Height of caption ``index`` in pixels; an empty one takes no room."""
        return len(self.lines[index]) * self.line_height if any(self.lines[index]) else 0

    @property
    def tallest(self) -> int:
        """Height of the tallest caption in pixels."""
        return max((self.height(index) for index in range(len(self.lines))), default=0)

    @property
    def widest(self) -> int:
        """Width of the widest line in pixels."""
        widths = [self.font.getlength(line) for lines in self.lines for line in lines]
        return math.ceil(max(widths, default=0))


@functools.lru_cache(maxsize=64)
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same letters on every machine. ``size`` in pixels."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> tuple[list[str], bool]:
    """Break a text into lines of at most ``width`` pixels; newlines in the text are kept.

    Returns:
        The lines, and whether a single word had to be cut in two because it alone is wider than a line.
    """
    lines, has_cut = [], False
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}".strip()
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                fitting = max(1, sum(font.getlength(word[:end]) <= width for end in range(1, len(word))))
                lines.append(word[:fitting])
                word, has_cut = word[fitting:], True
            line = word
        lines.append(line)
    return lines, has_cut


def fit_captions(texts: Sequence[str], width: float, height: float, largest: int, bold: bool = False) -> Captions:
    """Wrap captions into boxes of ``width`` x ``height`` pixels with the largest common font that fits.

    When even the smallest font is too tall nothing is dropped: the captions come back taller than the box and
    the caller makes room.
    """
    for size in range(largest, SMALLEST_FONT - 1, -1):
        font = load_font(size, bold)
        wrapped = [wrap_text(text, font, width) for text in texts]
        captions = Captions([lines for lines, _ in wrapped], font)
        if captions.tallest <= height and not any(has_cut for _, has_cut in wrapped):
            break
    return captions


def to_pixels(images: Tensor) -> np.ndarray:
    """Float images to bytes.

    Args:
        images: (N, 3, H, W) or (N, 1, H, W) float in [-1, 1]; values outside are clipped, NaN turns magenta.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        ValueError: The tensor is not a non-empty batch of one- or three-channel images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape) == 0:
        raise ValueError(f"Expected images of shape (N, 3, H, W) in [-1, 1], found {tuple(images.shape)}.")
    values = images.detach().to("cpu", torch.float32).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    pixels = values.add(1).mul(127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8).numpy()
    bad = values.isnan().any(dim=-1).numpy()
    if bad.any():
        log.warning("%.1f %% of the pixels to be drawn are NaN; they are shown in magenta.", 100 * bad.mean())
        pixels = np.where(bad[..., None], np.array(NOT_A_NUMBER, np.uint8), pixels)
    return pixels


def enlarge(images: Tensor, min_side: int) -> np.ndarray:
    """Repeat pixels by the least whole factor that makes the shorter side ``min_side`` or more.

    Args:
        images: (N, 3, H, W) float in [-1, 1].
        min_side: Wanted pixels; images that are large enough stay as they are.

    Returns:
        (N, s*H, s*W, 3) uint8.
    """
    pixels = to_pixels(images)
    factor = max(1, math.ceil(min_side / min(pixels.shape[1:3])))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def draw_images(images: Tensor, title: str = "", columns: int = 8, min_side: int = 96) -> Image.Image:
    """Lay images out as a sheet, left to right and top to bottom.

    Args:
        images: (N, 3, H, W) float in [-1, 1].
        title: One line (wrapped if need be) above the sheet.
        columns: Images per row.
        min_side: Small images are enlarged by a whole factor until their shorter side has this many pixels.

    Returns:
        An RGB picture.

    Raises:
        ValueError: ``images`` has another shape, or ``columns`` is not positive.
    """
    if columns < 1:
        raise ValueError(f"A sheet needs at least one column, found columns={columns}.")
    columns = min(columns, len(images)) or 1
    rows = [""] * math.ceil(len(images) / columns)
    return _compose(enlarge(images, min_side), rows, [""] * columns, title)


def draw_grid(grid: CaptionedGrid, min_side: int = 96) -> Image.Image:
    """Draw a captioned grid: row captions at the left, column captions on top, the title above all.

    Args:
        grid: Images in row-major order with their captions; an empty list means no captions on that axis.
        min_side: As in :func:`draw_images`.

    Returns:
        An RGB picture. Long captions are wrapped, then set smaller, then given more room; never cut off.

    Raises:
        ValueError: The number of images does not match the captions.
    """
    count, rows, columns = len(grid.images), list(grid.rows), list(grid.columns)
    num_rows = len(rows) or count // max(1, len(columns))
    num_columns = len(columns) or count // max(1, num_rows)
    if count == 0 or num_rows * num_columns != count:
        raise ValueError(
            f"The grid {grid.title!r} has {count} images but {len(rows)} row and {len(columns)} column "
            f"captions: expected rows x columns images in row-major order."
        )
    rows, columns = rows or [""] * num_rows, columns or [""] * num_columns
    return _compose(enlarge(grid.images, min_side), rows, columns, grid.title)


def _compose(pixels: np.ndarray, rows: list[str], columns: list[str], title: str) -> Image.Image:
    """Place (N, H, W, 3) uint8 images and words on one sheet; the last row may be short of images."""
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
    if title:
        _write(pen, head, 0, (MARGIN, MARGIN + head.tallest / 2), "lm", INK)
    x0, y0 = MARGIN + left_width, MARGIN + head_height + top_height
    for column, text in enumerate(columns):
        if text:  # captions end just above their images
            anchor = (x0 + column * pitch_x + cell_width / 2, y0 - GROUP_GAP - top.height(column) / 2)
            _write(pen, top, column, anchor, "mm", FAINT_INK)
    for row, text in enumerate(rows):
        if text:
            anchor = (x0 - GROUP_GAP, y0 + row * pitch_y + cell_height / 2)
            _write(pen, left, row, anchor, "rm", INK)
    for index, image in enumerate(pixels):
        row, column = divmod(index, len(columns))
        sheet.paste(Image.fromarray(image), (x0 + column * pitch_x, y0 + row * pitch_y))
    return sheet


def _write(
    pen: ImageDraw.ImageDraw,
    captions: Captions,
    index: int,
    middle: tuple[float, float],
    anchor: str,
    ink: tuple[int, int, int],
) -> None:
    """Write one caption; ``middle`` is the anchor point at half of its height."""
    x, y = middle
    first = y - (len(captions.lines[index]) - 1) * captions.line_height / 2
    for number, line in enumerate(captions.lines[index]):
        position = (x, first + number * captions.line_height)
        pen.text(position, line, fill=ink, font=captions.font, anchor=anchor)


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write a picture as PNG, whole or not at all; folders are made."""
    with atomic_write(path, "wb") as stream:
        image.save(stream, format="PNG")
    return Path(path)


def heat_map(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: str | os.PathLike,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Path:
    """Draw a matrix as coloured cells with the numbers written in them.

    Args:
        matrix: (len(rows), len(columns)) float; NaN cells are left grey with a dash.
        rows: Name of each row, top to bottom.
        columns: Name of each column, left to right.
        title: Shown above; may contain newlines.
        path: PNG file to write (atomically).
        value_range: Values of the lightest and darkest colour.

    Returns:
        The path written.

    Raises:
        ValueError: The matrix does not have one row and one column per name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (len(rows), len(columns)) or matrix.size == 0:
        raise ValueError(
            f"The heat map {title!r} has {len(rows)} row and {len(columns)} column names, "
            f"but its matrix has shape {matrix.shape}."
        )
    size = (2.6 + 0.85 * len(columns), 1.9 + 0.55 * len(rows))  # inches
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = _draw_cells(axes, matrix, value_range)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_write(path, "wb") as stream:
        stream.write(buffer.getvalue())
    return Path(path)


def _draw_cells(axes: Axes, matrix: np.ndarray, value_range: tuple[float, float]) -> AxesImage:
    """Coloured cells between white lines, each with its number."""
    low, high = value_range
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="Blues", vmin=low, vmax=high, aspect="auto")
    axes.set_facecolor("0.9")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(matrix.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(matrix.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for (row, column), value in np.ndenumerate(matrix):
        ink = "white" if value > low + 0.6 * (high - low) else "0.15"
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=ink)
    return image
