"""Data set of the image files that a text file names, one a line (taming-transformers)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.csv_files import encoding_of
from ldm.data.dataset import split_rows
from ldm.data.formats.encoded import EncodedImages
from ldm.data.formats.picture_files import square, to_array
from ldm.data.options import require_count
from ldm.data.paths import AnyPath
from ldm.data.rows import readable
from ldm.ranges import OptionalCount
from ldm.util import ConfigError, UserError


class ImageList(EncodedImages):
    """Images of a list of files; items also contain ``file_path_``, the path in the list.

    Args:
        list_file: text file of paths, one a line, relative to the working directory or to the folder of the list.
        paths: the paths themselves, in place of ``list_file``.
        size: side in pixels: the shorter side is resized (bilinear), and a square is cut out; null or 0 keeps the
            images, which must then have one size.
        background, max_pixels, white_level, damaged: see ``EncodedImages``; "skip" also leaves out missing files.
        do_augment, repeat, seed, augment: see ``ImageDataset``.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: the list or one of its files does not exist, or the list is empty.
    """

    def __init__(
        self,
        list_file: AnyPath | None = None,
        paths: Sequence[str] | None = None,
        size: OptionalCount | None = None,
        **options: Any,
    ) -> None:
        require_count("size", size or None, or_null=True)
        if (list_file is None) == (paths is None):
            raise ConfigError("data set: expected a list of files or `paths`, got both or none. Set one of them.")
        self.path = None if list_file is None else Path(list_file).expanduser()
        self.size = size
        if self.path is not None:
            with readable(self.path, "UTF-8"):
                paths = self.path.read_text(encoding=encoding_of(self.path)).splitlines()
        self.names = [name for path in paths if (name := str(path).strip())]
        found = [_find(name, self.path) for name in self.names]
        missing = [name for name, file in zip(self.names, found) if file is None]
        if missing and options.get("damaged") != "skip" or not self.names:
            wrong = f"{len(missing)} that do not exist, such as {missing[0]}" if missing else "none"
            places = f"relative to {Path.cwd()} or to the folder of the list"
            raise UserError(f"{self.path or 'paths'}: expected paths of images, {places}, got {wrong}.")
        self.files = [file or Path(name) for name, file in zip(self.names, found)]
        super().__init__(rows=self.rows_of(None), **options)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        return self.without_skipped(split_rows(len(self.names), split, limit))

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by row: (n,) int -> (n, H, W, 3) uint8."""
        pictures = [self.decode(row) for row in rows.tolist()]
        if self.size:
            pictures = [square(picture, self.size) for picture in pictures]
        if len({picture.size for picture in pictures}) > 1:
            raise UserError(f"{self.path or 'paths'}: expected images of one size, got several. Set size: in pixels.")
        return np.stack([to_array(picture) for picture in pictures])

    def encoded(self, row: int) -> Path:
        return self.files[row]

    def image_name(self, row: int) -> str:
        return str(self.files[row])

    def sources(self) -> list[Path]:
        return self.files

    def row_name(self, row: int) -> str:
        return self.names[row]

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the paths of rows."""
        return {"file_path_": [self.names[row] for row in rows.tolist()]}


def _find(name: str, list_file: Path | None) -> Path | None:
    """Return the file of a path as written, or with another encoding of its accents; None if there is none."""
    folders = [Path()] if list_file is None else [Path(), list_file.parent]
    forms = [name, name.replace("\\", "/"), *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next((folder / form for folder in folders for form in forms if (folder / form).is_file()), None)
