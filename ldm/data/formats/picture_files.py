"""Encoded images (PNG, JPEG, ...): finding, decoding, cropping. Every image file is decoded by ``decode_picture``."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageSequence, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from ldm.util import UserError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_SUFFIXES = (".gif", ".tif", ".tiff", ".apng", ".avif", ".heic", ".jfif", ".jp2", ".pgm", ".ppm", ".tga")
WHITE = (255, 255, 255)
FRAMES, DEEP_GREY = "frames not read", "grey of 16 bits"  # properties that ``inspect_picture`` returns
MAX_PIXELS = 178_956_970  # Pillow refuses more
_GREY_MAX = 65_535
_pillow_limit = threading.Lock()  # Pillow's limit is a global variable
_D2C_LEFT, _D2C_TOP, _D2C_SIDE = 25, 57, 128  # face crop of aligned 178 x 218 CelebA images
_TURNS = dict(  # EXIF orientation -> how viewers turn the image
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), start=2)
)


@dataclass(frozen=True)
class Decoding:
    """How encoded images are decoded.

    Attributes:
        background: (R, G, B) behind transparent pixels; None keeps the transparency: RGBA.
        max_pixels: an image with more pixels is refused.
        white_level: value of white in grey images of more than 8 bits; None takes that of the file, else 65535.
    """

    background: tuple[int, int, int] | None = WHITE
    max_pixels: int = MAX_PIXELS
    white_level: int | None = None


def decode_picture(data: bytes | Path, name: str, decoding: Decoding = Decoding()) -> Image.Image:
    """Decode encoded bytes or a file to RGB (RGBA without a background), as viewers show it.

    The orientation in EXIF is applied, grey images of more than 8 bits are scaled to 0 to 255, and of an animation the
    first frame is returned. Colour profiles (ICC) are ignored.

    Raises:
        UserError: the image is damaged, missing or too large; the message begins with ``name``.
    """
    with _named(data, name) as stored, _open(stored) as picture:
        if picture.width * picture.height > decoding.max_pixels:
            raise Image.DecompressionBombError(picture.width * picture.height, decoding.max_pixels)
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        shallow = _eight_bits(picture, stored, decoding.white_level)
        upright = shallow.transpose(Image.Transpose[turn]) if turn else shallow
        if decoding.background is None or not upright.has_transparency_data:
            return upright.convert("RGBA" if decoding.background is None else "RGB")
        layer = upright.convert("RGBA")
        canvas = Image.new("RGB", layer.size, decoding.background)
        canvas.paste(layer, mask=layer)
        return canvas


def inspect_picture(data: bytes, name: str) -> dict[str, int]:
    """Return the properties of an image that decoding changes, and their extent; check its checksums (PNG).

    Returns:
        ``FRAMES``: their number; ``DEEP_GREY``: the largest value; "transparent", "turned (EXIF)": 1.

    Raises:
        UserError: the image is damaged.
    """
    with _named(data, name) as stored:
        with _open(stored) as picture:
            picture.verify()
        with _open(stored) as picture:
            found = {FRAMES: sum(1 for _ in ImageSequence.Iterator(picture)) - 1}
            picture.seek(0)
            if _is_deep(picture):
                found[DEEP_GREY] = int(np.asarray(picture).max())
            elif picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                found["transparent"] = 1
            found["turned (EXIF)"] = int(_orientation(picture) in _TURNS)
    return {name: extent for name, extent in found.items() if extent}


@contextmanager
def _named(data: bytes | Path, name: str) -> Iterator[bytes]:
    """Provide the bytes of an image; turn the errors of reading it into a ``UserError`` that begins with its name."""
    stored = b""
    try:
        if isinstance(data, Path) and not stat.S_ISREG(data.stat().st_mode):  # reading a pipe would never end
            raise OSError(errno.EINVAL, "not a file")
        stored = data if isinstance(data, bytes) else data.read_bytes()
        yield stored
    except Image.DecompressionBombError as error:
        found, limit = error.args
        raise UserError(
            f"{name}: expected an image of at most {limit:,} pixels, got {found:,}. Set max_pixels: {found} to read it "
            f"({found * 7 / 1e9:.1f} GB of memory), or resize the file; data sets leave it out with damaged: skip."
        ) from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise many kinds of errors for damaged files
        is_unreadable = isinstance(error, OSError) and error.errno is not None
        if is_unreadable:
            found = f"it cannot be opened ({error.strerror})"
        elif not stored:
            found = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            start = stored.lstrip()[:12]
            found = f"it is {'a web page or XML' if start[:1] == b'<' else 'no image'} (it begins with {start!r})"
        else:
            found = f"decoding failed ({str(error) or type(error).__name__})"
        raise UserError(
            f"{name}: expected a complete PNG or JPEG image, but {found}. "
            f"{'Check the path and permissions' if is_unreadable else 'Replace it'}; data sets leave it out with "
            "damaged: skip."
        ) from error


def _open(data: bytes) -> Image.Image:
    """Open an image without Pillow's limit of its size, whose warning and error do not name the file."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(picture: Image.Image) -> int | None:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # viewers ignore damaged EXIF data, for which Pillow raises many kinds of errors
        return None


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def _eight_bits(picture: Image.Image, data: bytes, white: int | None) -> Image.Image:
    """Return an image with 8 bits per channel; one that has them already is returned unchanged."""
    if picture.mode == "LAB":
        profiles = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        return ImageCms.profileToProfile(picture, *profiles, outputMode="RGB") or picture
    if not _is_deep(picture):
        return picture
    values = np.asarray(picture)
    most = 1 if picture.mode == "F" else white or _GREY_MAX
    if not (values.min() >= 0 and (values.max() <= most or white)):  # also for NaN
        raise UserError(
            f"expected grey values from 0 to {most}, got {values.min():g} to {values.max():g}. Write 8 or 16 bits, or "
            "set white_level: to the value of white."
        )
    grey = Image.fromarray(scale_grey(values, white or (1 if most == 1 else _white_level(picture, data, values))))
    if isinstance(hidden := picture.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def scale_grey(values: np.ndarray, white: int) -> np.ndarray:
    """Map grey values from [0, white] to the nearest of 0 to 255, uint8; larger values are white."""
    if values.dtype.kind == "f":
        return np.floor(np.minimum(values.astype(np.float64) / white, 1) * 255 + 0.5).astype(np.uint8)
    return ((np.minimum(values.astype(np.int64), white) * 255 + white // 2) // white).astype(np.uint8)


def _white_level(picture: Image.Image, data: bytes, values: np.ndarray) -> int:
    """Return the value of white in the file: 65535, or that of fewer bits if the file declares and uses only these."""
    if isinstance(picture, TiffImageFile):
        return 2 ** min(16, picture.tag_v2.get(BITSPERSAMPLE, (16,))[0]) - 1
    position, bits = 8, 16
    while picture.format == "PNG" and (chunk := data[position + 4 : position + 8]) not in (b"IDAT", b""):
        bits = data[position + 8] if chunk == b"sBIT" else bits
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    # PNG requires values that are scaled to 16 bits also with sBIT: then the lowest bits of small values are 0
    is_unscaled = values.max() < 2**bits and np.any(values & (2 ** (16 - bits) - 1))
    return 2**bits - 1 if is_unscaled else _GREY_MAX


def find_pictures(folder: Path, suffixes: tuple[str, ...] = PICTURE_SUFFIXES) -> list[str]:
    """Return the sorted paths (with ``/``) of all images below a folder, except hidden files and folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = [name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
        below = Path(parent).relative_to(folder).as_posix()
        found += names if below == "." else [f"{below}/{name}" for name in names]
    return sorted(found)


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the number of names and the first ones, for messages."""
    return f"{len(names):,} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"


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
