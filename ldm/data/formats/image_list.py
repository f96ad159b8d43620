"""Data set of the image files that a text file names, one a line (taming-transformers)."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.dataset import ImageDataset
from ldm.data.formats.picture_files import decode_picture, square, to_array
from ldm.data.options import require_count
from ldm.data.paths import AnyPath
from ldm.util import ConfigError, UserError


class ImageList(ImageDataset):
    """Images of a list of files; items also contain ``file_path_`` and the entries of ``labels``.

    Args:
        list_file: text file of paths, one a line, relative to the working directory or to the folder of the list.
        paths: the paths themselves, in place of ``list_file``.
        size: side in pixels: the shorter side is resized (bilinear), and a square is cut out; null or 0 keeps the
            images, which must then have one size.
        random_crop: cut out a random square instead of the centre.
        labels: further entries by name, with one value per image.
        do_augment, repeat, seed: see ``ImageDataset``.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: the list or one of its files does not exist, or the list is empty.
    """

    def __init__(
        self,
        list_file: AnyPath | None = None,
        paths: Sequence[str] | None = None,
        size: int | None = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
        do_augment: bool = False,
        repeat: int = 1,
        seed: int = 0,
    ) -> None:
        require_count("size", size or None, or_null=True)
        if (list_file is None) == (paths is None):
            raise ConfigError("data set: expected a list of files or `paths`, got both or none. Set one of them.")
        self.path = None if list_file is None else Path(list_file).expanduser()
        self.size, self.random_crop = size, random_crop
        names = [str(name) for name in paths or ()] if self.path is None else _read_lines(self.path)
        self.files = [_find(name, self.path) for name in names]
        missing = [name for name, file in zip(names, self.files) if file is None]
        if missing or not names:
            found = f"{len(missing)} that do not exist, such as {missing[0]}" if missing else "none"
            places = f"relative to {Path.cwd()} or to the folder of the list"
            raise UserError(f"{self.path or 'paths'}: expected paths of images, {places}, got {found}.")
        self.entries = {**(labels or {}), "file_path_": names}
        for key, values in self.entries.items():
            if len(values) != len(names):
                raise ConfigError(f"labels.{key}: expected {len(names)} values, one per image, got {len(values)}.")
        super().__init__(np.arange(len(names)), repeat, do_augment, seed)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by row: (n,) int -> (n, H, W, 3) uint8."""
        places = self._rng(rows).random((len(rows), 2)) if self.random_crop else np.full((len(rows), 2), 0.5)
        pictures = [decode_picture(self.files[row], str(self.files[row])) for row in rows.tolist()]
        if self.size:
            pictures = [square(picture, self.size, place) for picture, place in zip(pictures, places.tolist())]
        if len({picture.size for picture in pictures}) > 1:
            raise UserError(f"{self.path or 'paths'}: expected images of one size, got several. Set size: in pixels.")
        return np.stack([to_array(picture) for picture in pictures])

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the other entries of rows; numbers as a tensor."""
        picked = {key: [values[row] for row in rows.tolist()] for key, values in self.entries.items()}
        return {k: torch.tensor(v) if isinstance(v[0], (int, float)) else v for k, v in picked.items()}


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file (UTF-8), one path a line; reading failed ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def _find(name: str, list_file: Path | None) -> Path | None:
    """Return the file of a path as written, or with another encoding of its accents; None if there is none."""
    folders = [Path()] if list_file is None else [Path(), list_file.parent]
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next((folder / form for folder in folders for form in forms if (folder / form).is_file()), None)
