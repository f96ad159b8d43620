"""Captions of pictures: fonts, line breaks, and the largest font in which all captions of an axis fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

SMALLEST_FONT = 8  # pixels; smaller text is not legible

Color = tuple[int, int, int]


class Captions(NamedTuple):
    """Captions broken into lines, all in one font."""

    lines: list[list[str]]
    font: ImageFont.FreeTypeFont

    @property
    def line_height(self) -> int:
        """Distance between base lines in pixels."""
        return math.ceil(self.font.size * 1.25)

    def height(self, index: int) -> int:
        """Return the height of caption ``index`` in pixels; 0 for an empty one."""
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

    def write(self, pen: ImageDraw.ImageDraw, index: int, middle: tuple[float, float], anchor: str, ink: Color) -> None:
        """Draw caption ``index``; ``middle`` is the position of ``anchor`` (PIL's) at half of the caption's height."""
        x, y = middle
        first = y - (len(self.lines[index]) - 1) * self.line_height / 2
        for number, line in enumerate(self.lines[index]):
            pen.text((x, first + number * self.line_height), line, fill=ink, font=self.font, anchor=anchor)


@functools.lru_cache(maxsize=64)
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans of ``size`` pixels from matplotlib's files, so that pictures are equal on all machines."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> tuple[list[str], bool]:
    """Break a text into lines of at most ``width`` pixels; newlines in the text are kept.

    Returns:
        The lines, and whether a word wider than a line was cut.
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

    Captions that do not fit in the smallest font either are returned in full, taller than the box.
    """
    for size in range(largest, SMALLEST_FONT - 1, -1):
        font = load_font(size, bold)
        wrapped = [wrap_text(text, font, width) for text in texts]
        captions = Captions([lines for lines, _ in wrapped], font)
        if captions.tallest <= height and not any(has_cut for _, has_cut in wrapped):
            break
    return captions
