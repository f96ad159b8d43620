"""Base class of the data sets of encoded images (PNG, JPEG, ...): how they are decoded, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.dataset import ImageDataset
from ldm.data.formats.picture_files import MAX_PIXELS, WHITE, Decoding, decode_picture, first_names, inspect_picture
from ldm.data.options import require_choice, require_count
from ldm.data.rows import fingerprint
from ldm.errors import report_once
from ldm.ranges import PositiveInt
from ldm.util import ConfigError, UserError

BACKGROUNDS = {"white": WHITE, "black": (0, 0, 0)}
_THREADS = 4  # decoding releases the interpreter lock
_damaged: dict[int, dict[int, str]] = {}  # data sets of one source (splits) are verified once


class EncodedImages(ImageDataset):
    """Images that are decoded when they are read. A subclass implements ``encoded``, ``image_name`` and ``sources``.

    Args:
        rows: see ``ImageDataset``.
        background: colour behind transparent pixels: white, black, or a list [r, g, b] of 0 to 255.
        max_pixels: images with more pixels count as damaged; memory of about 7 bytes per pixel is needed to read one.
        white_level: value of white in grey images of more than 8 bits, such as 4095 for 12 bits in files of 16; null
            takes that of the file, else 65535.
        damaged: "error" raises an error when a damaged image is read. "skip" reads all images of the set first, and
            leaves out the rows of those that are damaged; the other rows, splits and words remain the same.
        options: see ``ImageDataset``.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: with "skip", no image can be read.
    """

    def __init__(
        self,
        rows: np.ndarray,
        background: str | Sequence[int] = "white",
        max_pixels: PositiveInt = MAX_PIXELS,
        white_level: PositiveInt | None = None,
        damaged: str = "error",
        **options: Any,
    ) -> None:
        require_choice("damaged", damaged, ("error", "skip"))
        require_count("max_pixels", max_pixels)
        require_count("white_level", white_level, or_null=True)
        self.decoding = Decoding(_colour(background), max_pixels, white_level)
        if damaged == "skip":
            self._skip_damaged(self.rows_of(None) if len(rows) else rows)
        super().__init__(self.without_skipped(rows), **options)

    def encoded(self, row: int) -> bytes | Path:
        """Return an image as it is stored, or its path."""
        raise NotImplementedError(f"{type(self).__name__} must implement encoded()")

    def image_name(self, row: int) -> str:
        """Return the name of an image for messages, with its folder or file."""
        raise NotImplementedError(f"{type(self).__name__} must implement image_name()")

    def sources(self) -> list[Path]:
        """Return the files that contain the images."""
        raise NotImplementedError(f"{type(self).__name__} must implement sources()")

    def original(self, row: int) -> bytes:
        stored = self.encoded(row)
        return stored if isinstance(stored, bytes) else stored.read_bytes()

    def decode(self, row: int) -> Image.Image:
        """Return the image of a row in RGB; raise a ``UserError`` if it is damaged."""
        return decode_picture(self.encoded(row), self.image_name(row), self.decoding)

    def _skip_damaged(self, rows: np.ndarray) -> None:
        files = self.sources()
        names = (self.image_name(row) for row in rows.tolist())  # with the resolution in LMDBs
        key = hash((*names, fingerprint(*(file for file in files if file.exists())), self.decoding))
        if key not in _damaged:
            with ThreadPoolExecutor(_THREADS) as pool:
                reasons = dict(zip(rows.tolist(), pool.map(self._damage, rows.tolist())))
            _damaged[key] = {row: reason for row, reason in reasons.items() if reason}
        self.skipped = _damaged[key]
        if not self.skipped:
            return
        reasons = list(self.skipped.values())
        if len(reasons) == len(rows):
            raise UserError(f"{self.path}: expected images that can be read, got none. {reasons[0]}")
        self.notes = {**self.notes, "images skipped": f"{len(reasons):,} of {len(rows):,}: {reasons[0]}"}
        listed = first_names([self.image_name(row) for row in self.skipped], most=10)
        lost = "" if self.space is None else " The metrics have no factors."
        report_once(f"{self.path}: damaged images were skipped: {listed}. {reasons[0]}{lost}")
        self.space = None

    def _damage(self, row: int) -> str:
        """Return the reason why an image cannot be read, or ""."""
        try:
            self.decode(row)
            inspect_picture(self.original(row), self.image_name(row))
        except UserError as error:
            return str(error)
        return ""


def _colour(background: str | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(background, str):
        require_choice("background", background, BACKGROUNDS)
        return BACKGROUNDS[background]
    values = list(background) if isinstance(background, Sequence) else []
    if len(values) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in values):
        raise ConfigError(
            f"background: expected {', '.join(BACKGROUNDS)} or [r, g, b] of 0 to 255, got {background!r}. Correct it."
        )
    red, green, blue = values
    return red, green, blue
