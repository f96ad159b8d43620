"""Encoded pictures and attribute tables as people keep them: decoding, cropping, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ldm.util import UserError

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
        raise UserError(f"{name} cannot be decoded ({err}); expected a whole PNG or JPEG picture. Write it "
                        "anew") from err


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
        raise UserError(f"{name} has {picture.width} x {picture.height} pixels; crop_d2c cuts aligned CelebA "
                        f"pictures of 178 x 218, at least {right} x {bottom}. Set crop_d2c: false")
    return picture.crop((_D2C_LEFT, _D2C_TOP, right, bottom))


def to_array(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB picture."""
    return np.array(picture, dtype=np.uint8)


def read_attributes(path: Path) -> dict[str, list[str]]:
    """Attribute texts by picture name.

    A .csv has a header and the picture's name in its first column, one attribute per further column. A .json
    is an object: ``{"name.png": ["red floor", ...], ...}``.

    Raises:
        UserError: missing or malformed file; the line or name is told.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path} cannot be read ({err}); expected a UTF-8 .csv or .json of attributes") from err
    if path.suffix.lower() == ".json":
        return _from_json(path, text)
    if path.suffix.lower() == ".csv":
        return _from_csv(path, text)
    raise UserError(f"{path} is a {path.suffix or 'nameless'} file; expected .csv or .json")


def _from_json(path: Path, text: str) -> dict[str, list[str]]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as err:
        raise UserError(f"{path} is not JSON ({err})") from err
    if not isinstance(table, dict):
        raise UserError(f'{path} holds a {type(table).__name__}; expected an object {{"name.png": ["text", ...]}}')
    for name, texts in table.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{path}: {name!r} holds {texts!r}; expected a list of strings")
    return table


def _from_csv(path: Path, text: str) -> dict[str, list[str]]:
    rows = list(csv.reader(io.StringIO(text)))
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(f"{path}: expected a header (image, attribute, ...) and a line per picture; "
                        f"found {len(rows)} lines")
    table = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise UserError(f"{path}, line {number}: {len(row)} columns, the header has {len(rows[0])}")
        table[row[0]] = row[1:]
    return table
