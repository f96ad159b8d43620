"""Animated GIFs of captioned grids, such as the steps of sampling."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.pictures.draw import draw_grid
from ldm.pictures.grid import CaptionedGrid
from ldm.util import atomic_write

_SAMPLE = 128  # pixels per side of a frame from which its colors are taken


def save_gif(grids: Sequence[CaptionedGrid], path: str | os.PathLike, milliseconds: int = 60, hold: int = 1500) -> Path:
    """Write an animated GIF that repeats forever and return its path; folders are created.

    All frames share one palette, and colors are not dithered, so that areas of one color do not flicker.

    Args:
        grids: one frame each, in order; see :func:`ldm.pictures.draw.draw_grid`.
        path: GIF file to write.
        milliseconds: duration of a frame; the format stores multiples of 10.
        hold: duration of the last frame in milliseconds.

    Raises:
        ValueError: there are no frames, or they differ in size.
    """
    frames = [draw_grid(grid) for grid in grids]
    if len(sizes := sorted({frame.size for frame in frames})) != 1:
        raise ValueError(
            f"{path}: expected frames of one size, got {', '.join(f'{w}x{h}' for w, h in sizes) or 'no frames'}. Use "
            "images of one size, and captions of similar length"
        )
    weighted = frames + frames[-1:] * len(frames)  # the last frame is seen longest, and noise has all colors
    samples = Image.new("RGB", (_SAMPLE, _SAMPLE * len(weighted)))
    for number, frame in enumerate(weighted):
        samples.paste(frame.resize((_SAMPLE, _SAMPLE), Image.Resampling.NEAREST), (0, number * _SAMPLE))
    palette = samples.quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [milliseconds] * len(others) + [hold]
    with atomic_write(path, "wb") as stream:
        first.save(stream, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return Path(path)
