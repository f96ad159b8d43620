"""Data set of the image files that a text file names, one a line (taming-transformers)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dataset import ImageDataset
from ldm.data.formats.picture_files import decode_picture, square, to_array
from ldm.data.options import require_count
from ldm.data.paths import AnyPath
from ldm.data.rows import readable
from ldm.ranges import OptionalCount
from ldm.util import ConfigError, UserError


class ImageList(ImageDataset):
    """Images of a list of files; items also contain ``file_path_``, the path in the list.

    Args:
        list_file: text file of paths, one a line, relative to the working directory or to the folder of the list.
        paths: the paths themselves, in place of ``list_file``.
        size: side in pixels: the shorter side is resized (bilinear), and a square is cut out; null or 0 keeps the
            images, which must then have one size.
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
                paths = self.path.read_text(encoding="utf-8-sig").splitlines()
        self.names = [name for path in paths if (name := str(path).strip())]
        self.files = [_find(name, self.path) for name in self.names]
        missing = [name for name, file in zip(self.names, self.files) if file is None]
        if missing or not self.names:
            found = f"{len(missing)} that do not exist, such as {missing[0]}" if missing else "none"
            places = f"relative to {Path.cwd()} or to the folder of the list"
            raise UserError(f"{self.path or 'paths'}: expected paths of images, {places}, got {found}.")
        super().__init__(np.arange(len(self.names)), **options)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by row: (n,) int -> (n, H, W, 3) uint8."""
        pictures = [decode_picture(self.files[row], str(self.files[row])) for row in rows.tolist()]
        if self.size:
            pictures = [square(picture, self.size) for picture in pictures]
        if len({picture.size for picture in pictures}) > 1:
            raise UserError(f"{self.path or 'paths'}: expected images of one size, got several. Set size: in pixels.")
        return np.stack([to_array(picture) for picture in pictures])

    def original(self, row: int) -> bytes:
        return self.files[row].read_bytes()

    def row_name(self, row: int) -> str:
        return self.names[row]

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the paths of rows."""
        return {"file_path_": [self.names[row] for row in rows.tolist()]}


def _find(name: str, list_file: Path | None) -> Path | None:
    """Return the file of a path as written, or with another encoding of its accents; None if there is none."""
    folders = [Path()] if list_file is None else [Path(), list_file.parent]
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next((folder / form for folder in folders for form in forms if (folder / form).is_file()), None)
