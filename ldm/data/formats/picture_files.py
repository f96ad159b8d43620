"""Encoded pictures as people keep them: finding, decoding, cropping."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.util import UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_D2C_LEFT, _D2C_TOP, _D2C_SIDE = 25, 57, 128  # face crop of aligned 178 x 218 CelebA pictures


def decode_picture(data: bytes | Path, name: str) -> Image.Image:
    """Decode a PNG, JPEG, ... to RGB.

    Args:
        data: encoded bytes, or the file.
        name: for the message.

    Raises:
        UserError: the bytes are no picture or damaged.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as err:
        raise UserError(
            f"{name} cannot be decoded ({err}); expected a whole PNG or JPEG picture. Write it anew"
        ) from err


def find_pictures(folder: Path) -> list[str]:
    """All pictures in a folder and its sub-folders, by their path below it with ``/``, sorted; hidden ones left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        found += [
            prefix + name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def stretch(picture: Image.Image, size: int) -> Image.Image:
    """Both sides resized to ``size`` (bicubic), whatever their ratio was: size x size."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def square(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to ``size`` (bilinear), then the centre cut out: size x size."""
    width, height = picture.size
    if width <= height:
        wanted = (size, size * height // width)
    else:
        wanted = (size * width // height, size)
    if wanted != picture.size:
        picture = picture.resize(wanted, Image.Resampling.BILINEAR)
    left, top = round((wanted[0] - size) / 2), round((wanted[1] - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def crop_face(picture: Image.Image, name: str) -> Image.Image:
    """The usual face window of aligned, unresized CelebA pictures: 128 x 128.

    Raises:
        UserError: the picture is smaller than the window.
    """
    right, bottom = _D2C_LEFT + _D2C_SIDE, _D2C_TOP + _D2C_SIDE
    if picture.width < right or picture.height < bottom:
        raise UserError(
            f"{name} has {picture.width} x {picture.height} pixels; crop_d2c cuts aligned CelebA "
            f"pictures of 178 x 218, at least {right} x {bottom}. Set crop_d2c: false"
        )
    return picture.crop((_D2C_LEFT, _D2C_TOP, right, bottom))


def to_array(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB picture."""
    return np.array(picture, dtype=np.uint8)
