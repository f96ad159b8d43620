"""One's own pictures: a folder, and if there is one a table of attributes. No Python needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.dataset import ImageDataset, check_unset_prob, leave_unset, split_rows
from ldm.data.formats.attribute_tables import AttributeTable, read_table, table_factors, table_texts, table_vocabulary
from ldm.data.formats.picture_files import decode_picture, find_pictures, square, stretch, to_array
from ldm.data.places import data_root
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_FITS = {"crop": square, "stretch": stretch}
# split -> names of sub-folders that hold it, the first one there is
_SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}


class ImageFolder(ImageDataset):
    """Pictures of a folder and its sub-folders, by sorted path; with a table, those it names.

    Every attribute column of the table gives one text per image (``text``, what CLIP-DisDiff reads). Columns whose
    every combination has equally many pictures are also factors: then items hold ``factors``, the rows stand in the
    order of the factors, and the disentanglement metrics can be computed.

    Args:
        path: the folder; None takes the one in the variable ``DATA_ROOT``.
        attributes: .csv or .json of the attributes (``read_table``), beside the folder or in it; None for none.
        image_size: side of the images in pixels.
        fit: "crop" resizes the shorter side (bilinear) and cuts out the centre; "stretch" resizes both (bicubic).
        split: null (all), train, validation or test: the sub-folders train, val (valid, validation) and test where
            the folder has them, else see ``split_rows``.
        limit: see ``split_rows``.
        factors: columns that are factors; null takes all columns if they make a full product, [] none.
        templates: column -> phrase with ``{}`` for the entry, such as ``{floor: "{} floor"}``; without one a text is
            the entry as it stands.
        num_attributes: number of texts per image that the model expects (its units); null takes that of the table.
        unset_prob: probability that a text is left empty, unit by unit.
        do_augment: mirror half of the images, at random.
        repeat: show each image so many times per epoch.
        seed: of everything random.

    Raises:
        ConfigError: an option outside its choices.
        UserError: no pictures, a picture that the table names and the folder lacks, a malformed table.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        attributes: str | os.PathLike | None = None,
        image_size: int = 64,
        fit: str = "crop",
        split: str | None = None,
        limit: int | None = None,
        factors: Sequence[str] | None = None,
        templates: Mapping[str, str] | None = None,
        num_attributes: int | None = None,
        unset_prob: float = 0.0,
        do_augment: bool = False,
        repeat: int = 1,
        seed: int = 0,
    ) -> None:
        if image_size < 1:
            raise ConfigError(f"image_size must be a number of pixels, found {image_size}")
        if fit not in _FITS:
            raise ConfigError(f"unknown fit {fit!r}; expected {' or '.join(_FITS)}")
        check_unset_prob(unset_prob)
        if attributes is None and (factors or templates or num_attributes):
            raise ConfigError("factors, templates and num_attributes describe a table: name it in attributes:")
        self.path = data_root() if path is None else Path(path).expanduser()
        self.image_size, self.fit, self.unset_prob = image_size, fit, unset_prob
        self.pictures = _pictures(self.path)
        self._texts: list[list[str]] | None = None
        prefix, rest = _split_folder(self.path, self.pictures, split)
        if attributes is not None:
            table = _table(self.path, attributes, frozenset(self.pictures))
            self._use(_below(table, prefix), factors, templates or {}, num_attributes)
        else:
            self.pictures = [name for name in self.pictures if name.startswith(prefix)]
        super().__init__(split_rows(len(self.pictures), rest, limit), repeat, do_augment, seed)

    def _use(
        self, table: AttributeTable, factors: Sequence[str] | None, templates: Mapping[str, str], expected: int | None
    ) -> None:
        """Take up the texts and, where there are any, the factors and words of a table."""
        found = None if factors is not None and not factors else table_factors(table, factors)
        if found is not None:
            table, self.space = table.select(found.order), found.space
        if expected not in (None, len(table.columns)):
            raise UserError(
                f"{table.path} has {len(table.columns)} attributes ({', '.join(table.columns)}), expected "
                f"{expected}; set num_attributes and the model's latent_unit to the number of columns"
            )
        self.pictures, self._texts = list(table.pictures), table_texts(table, templates)
        self.vocabulary = table_vocabulary(table, templates)

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images by row: (n,) int -> (n, image_size, image_size, 3) uint8."""
        fit = _FITS[self.fit]
        files = [self.path / self.pictures[row] for row in rows.tolist()]
        return np.stack([to_array(fit(decode_picture(file, str(file)), self.image_size)) for file in files])

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Texts and factors of rows, as far as there are any."""
        labels = {}
        if self._texts is not None:
            texts = [self._texts[row] for row in rows.tolist()]
            labels["text"] = leave_unset(texts, self.unset_prob, np.random.default_rng([self.seed, *rows.tolist()]))
        if self.space is not None:
            labels["factors"] = torch.from_numpy(self.space.factors_of(rows))
        return labels


def _pictures(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; set path: (or the environment variable DATA_ROOT) to a folder of pictures"
        )
    found = find_pictures(folder)
    if not found:
        raise UserError(f"{folder} and its sub-folders hold no pictures (.png, .jpg, .jpeg, .webp, .bmp)")
    return found


def _split_folder(folder: Path, pictures: Sequence[str], split: str | None) -> tuple[str, str | None]:
    """The sub-folder (with ``/``, or empty) that a split is taken from, and the split that is left to make."""
    split = {"val": "validation", "valid": "validation"}.get(split, split)
    there = {name.partition("/")[0] for name in pictures if "/" in name}
    if split not in _SPLIT_FOLDERS or "train" not in there:
        return "", split
    for name in _SPLIT_FOLDERS[split]:
        if name in there:
            return f"{name}/", None
    raise ConfigError(
        f"{folder} has a folder train, but none of {', '.join(_SPLIT_FOLDERS[split])} for split: "
        f"{split}; use split: null for all pictures"
    )


def _table(folder: Path, attributes: str | os.PathLike, pictures: frozenset[str]) -> AttributeTable:
    path = Path(attributes).expanduser()
    if not path.is_file() and (folder / path).is_file():
        path = folder / path
    table = read_table(path)
    missing = [name for name in table.pictures if name not in pictures]
    if missing:
        raise UserError(
            f"{folder / missing[0]} does not exist, but {path} names it (and {len(missing) - 1} more that "
            "do not exist); names are paths below the folder"
        )
    if len(table.pictures) < len(pictures):
        logger.info(
            "%s names %d of the %d pictures in %s; the others are left out",
            path,
            len(table.pictures),
            len(pictures),
            folder,
        )
    return table


def _below(table: AttributeTable, prefix: str) -> AttributeTable:
    """The pictures of a table that lie in a sub-folder."""
    places = [place for place, name in enumerate(table.pictures) if name.startswith(prefix)]
    if not places:
        raise UserError(f"{table.path} names no picture in {prefix}")
    return table.select(places) if prefix else table
