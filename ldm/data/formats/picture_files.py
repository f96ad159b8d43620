"""Encoded images (PNG, JPEG, ...): finding, decoding, cropping."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.util import UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_D2C_LEFT, _D2C_TOP, _D2C_SIDE = 25, 57, 128  # face crop of aligned 178 x 218 CelebA images


def decode_picture(data: bytes | Path, name: str, mode: str = "RGB") -> Image.Image:
    """Decode encoded bytes or a file to a mode of Pillow; raise a ``UserError`` with ``name`` if they are damaged."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            return picture.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{name}: expected a complete PNG or JPEG image, but decoding failed ({error}). Write it again."
        ) from error


def find_pictures(folder: Path) -> list[str]:
    """Return the sorted paths (with ``/``) of all images below a folder, except hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")]
        below = Path(parent).relative_to(folder).as_posix()
        found += names if below == "." else [f"{below}/{name}" for name in names]
    return sorted(found)


def stretch(picture: Image.Image, size: int) -> Image.Image:
    """Resize both sides (bicubic), independently of their ratio: size x size."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def square(picture: Image.Image, size: int, offset: Sequence[float] | None = None) -> Image.Image:
    """Resize the shorter side (bilinear) and cut out size x size: the centre, or at ``offset`` (x, y) in [0, 1)."""
    width, height = picture.size
    wanted = (size, size * height // width) if width <= height else (size * width // height, size)
    if wanted != picture.size:
        picture = picture.resize(wanted, Image.Resampling.BILINEAR)
    free = wanted[0] - size, wanted[1] - size
    if offset is None:
        left, top = round(free[0] / 2), round(free[1] / 2)
    else:
        left, top = int(offset[0] * (free[0] + 1)), int(offset[1] * (free[1] + 1))
    return picture.crop((left, top, left + size, top + size))


def crop_face(picture: Image.Image, name: str) -> Image.Image:
    """Cut out the usual face window (128 x 128) of aligned CelebA images; raise a ``UserError`` for smaller ones."""
    right, bottom = _D2C_LEFT + _D2C_SIDE, _D2C_TOP + _D2C_SIDE
    if picture.width < right or picture.height < bottom:
        raise UserError(
            f"{name}: crop_d2c expects aligned CelebA images of 178 x 218 pixels, at least {right} x {bottom}; got "
            f"{picture.width} x {picture.height}. Set crop_d2c: false."
        )
    return picture.crop((_D2C_LEFT, _D2C_TOP, right, bottom))


def to_array(picture: Image.Image) -> np.ndarray:
    """Convert an RGB image to (H, W, 3) uint8."""
    return np.array(picture, dtype=np.uint8)
