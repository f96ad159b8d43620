"""Data set of a folder of images with an optional table of attributes; it needs no Python code of the user."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.attributes import AttributeTexts, leave_unset
from ldm.data.dataset import ImageDataset, held_out_rows, split_rows
from ldm.data.formats.attribute_tables import (
    AttributeTable,
    held_out_combinations,
    read_table,
    table_factors,
    table_texts,
    table_values,
    table_vocabulary,
)
from ldm.data.formats.picture_files import PICTURE_SUFFIXES, decode_picture, find_pictures, square, stretch, to_array
from ldm.data.options import require_choice, require_count, require_share
from ldm.data.paths import AnyPath, data_root
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

BY_FOLDER = "folder"
_FITS = {"crop": square, "random_crop": square, "stretch": stretch}
_HOLDOUT_SEED = 13
_CROP_SEED = 11  # random crops have a random stream of their own
# split -> names of its sub-folder, in order of preference
_SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}


class ImageFolder(ImageDataset):
    """Images of a folder and its sub-folders, sorted by path; with a table, the images that it names.

    Every attribute column of the table gives one text per image (``text``, which CLIP-DisDiff reads). Columns whose
    combinations all have the same number of images are also factors: then items contain ``factors``, the rows are in
    the order of the factors, and the disentanglement metrics can be computed.

    With ``label``, items contain the class of the image: ``class_label`` (int64) and ``human_label`` (its name).

    Args:
        path: the folder; None takes ``DATA_ROOT``.
        attributes: .csv or .json of the attributes (``read_table``), beside the folder or in it; None for no table.
        image_size: side of the images in pixels.
        fit: "crop" resizes the shorter side (bilinear) and cuts out the centre; "random_crop" cuts out a random part of
            it, for training; "stretch" resizes both sides (bicubic).
        split: null (all), train, validation or test: the sub-folders train, val (valid, validation) and test if the
            folder has them, else see ``split_rows``.
        limit: see ``split_rows``.
        factors: columns that are factors; null takes all columns if they make a full product, [] takes none.
        templates: column -> phrase with ``{}`` for the entry, such as ``{size: "{} in size"}``; without a template
            the text is the entry.
        num_attributes: number of texts per image that the model expects (its units); null takes that of the table.
        unset_prob: probability with which each text is left empty.
        do_augment: mirror half of the images at random.
        repeat: number of times each image is shown per epoch.
        seed: seed of all random choices.
        name: name of the data set in tables of scores; None takes that of the folder.
        label: "folder" takes the class from the folder of each image, below that of the split: the position of its name
            among the sorted names of all splits (as in ImageNet). The name of a column takes the entry itself if all of
            them are integers from 0, else its position among the sorted entries. null delivers no classes.

    Attributes:
        class_names: name of each class number; empty without ``label``.

    Raises:
        ConfigError: an option is outside its choices.
        UserError: there are no images, an image in the table is missing, or the table is malformed.
    """

    def __init__(
        self,
        path: AnyPath | None = None,
        attributes: AnyPath | None = None,
        image_size: int = 64,
        fit: str = "crop",
        split: str | None = None,
        limit: int | None = None,
        factors: Sequence[str] | None = None,
        templates: Mapping[str, str | Sequence[str]] | None = None,
        num_attributes: int | None = None,
        unset_prob: float = 0.0,
        do_augment: bool = False,
        repeat: int = 1,
        seed: int = 0,
        name: str | None = None,
        label: str | None = None,
        text: str | None = "attributes",
        phrasing: str = "random",
        caption_weights: Sequence[float] | None = None,
        single_caption_share: float = 0.5,
        holdout: float = 0.0,
    ) -> None:
        require_count("image_size", image_size)
        require_choice("fit", fit, _FITS)
        require_share("unset_prob", unset_prob)
        require_share("holdout", holdout)
        if attributes is None and (factors or templates or num_attributes or holdout or label not in (None, BY_FOLDER)):
            raise ConfigError(
                "factors, templates, num_attributes, holdout and a label other than 'folder' apply to a table. Set "
                "attributes: to its path."
            )
        self.path = data_root() if path is None else Path(path).expanduser()
        self.image_size, self.fit, self.unset_prob = image_size, fit, unset_prob
        self.name = name or self.path.resolve().name
        self.pictures = everything = _pictures(self.path)
        self._texts: list[list[str]] | None = None
        self.class_names: dict[int, str] = {}
        prefix, rest = _split_folder(self.path, self.pictures, split)
        if attributes is not None:
            table = _table(self.path, attributes, frozenset(self.pictures))
            table = self._use(_below(table, prefix), factors, templates or {}, num_attributes)
            if self.vocabulary is not None:
                options = (text, phrasing, unset_prob, caption_weights, single_caption_share)
                self.attribute_texts = AttributeTexts(self.vocabulary, *options)
        else:
            table, self.pictures = None, [name for name in self.pictures if name.startswith(prefix)]
        if label is not None:
            found = None if label == BY_FOLDER else _column_classes(table, label)
            self.class_names, self._classes = found or self._folder_classes(everything, bool(prefix))
        self.holdout = holdout
        if holdout:
            held_out = held_out_combinations(self._values, holdout, _HOLDOUT_SEED)
            self._held_out = {row.tobytes() for row in held_out}
        super().__init__(self.rows_of(rest, limit), repeat, do_augment, seed)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        """See ``ImageDataset``."""
        if not self.holdout or split in (None, "test"):
            return split_rows(len(self.pictures), split, limit)
        rows = np.arange(len(self.pictures))
        return held_out_rows(rows, self.is_unseen(self._values), split, limit, np.random.RandomState(_HOLDOUT_SEED))

    def is_unseen(self, values: np.ndarray) -> np.ndarray:
        """See ``ImageDataset``."""
        return np.array([row.tobytes() in self._held_out for row in np.ascontiguousarray(values)], dtype=bool)

    def attribute_values(self, rows: np.ndarray) -> np.ndarray:
        """See ``ImageDataset``."""
        return self._values[rows]

    def _use(
        self, table: AttributeTable, factors: Sequence[str] | None, templates: Mapping[str, str], expected: int | None
    ) -> AttributeTable:
        """Set the texts, factors and words of a table; return it in the order of the rows."""
        found = None if factors is not None and not factors else table_factors(table, factors)
        if found is not None:
            space, table = found
            self.space = space.named(self.name)
        if expected not in (None, len(table.columns)):
            raise UserError(
                f"{table.path}: expected {expected} attributes, got {len(table.columns)} ({', '.join(table.columns)}). "
                "Set num_attributes and the model's latent_unit to the number of columns."
            )
        self.pictures, self._texts = list(table.pictures), table_texts(table, templates)
        self.vocabulary, self._values = table_vocabulary(table, templates), table_values(table)
        return table

    def _folder_classes(self, everything: Sequence[str], is_split: bool) -> tuple[dict[int, str], np.ndarray]:
        """Return the names of all class folders, and the number of that of each image.

        With ``is_split``, the folder of the split comes first. Raises a ``UserError`` for an image without a class.
        """
        splits = {name for names in _SPLIT_FOLDERS.values() for name in names}
        inside = [name for name in everything if name.partition("/")[0] in splits]
        depth = int(is_split or len(inside) == len(everything))
        folders = {name: name.split("/")[depth:-1] for name in (inside if depth else everything)}
        if outside := [name for name, parts in folders.items() if not parts]:
            raise UserError(
                f"{self.path}: expected every image in a folder named after its class (label: folder), got "
                f"{outside[0]}. Move the image, or take the classes from a column of a table (label: COLUMN)."
            )
        names = dict(enumerate(sorted({parts[0] for parts in folders.values()})))
        numbers = {name: number for number, name in names.items()}
        return names, np.array([numbers[folders[name][0]] for name in self.pictures])

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images by row: (n,) int -> (n, image_size, image_size, 3) uint8."""
        fit, files = _FITS[self.fit], [self.path / self.pictures[row] for row in rows.tolist()]
        options: list[dict[str, Any]] = [{}] * len(files)
        if self.fit == "random_crop":
            options = [{"offset": offset} for offset in self._rng(rows, _CROP_SEED).random((len(files), 2)).tolist()]
        pictures = (decode_picture(file, str(file)) for file in files)
        return np.stack([to_array(fit(picture, self.image_size, **how)) for picture, how in zip(pictures, options)])

    def original(self, row: int) -> bytes:
        """See ``ImageDataset``."""
        return (self.path / self.pictures[row]).read_bytes()

    def row_name(self, row: int) -> str:
        """See ``ImageDataset``."""
        return (self.path / self.pictures[row]).as_posix()

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return texts and factors of rows, if the data set has them."""
        labels = {}
        if self.attribute_texts is not None:
            labels |= self.attribute_labels(self._values[rows], rows)
        elif self._texts is not None:
            texts = [self._texts[row] for row in rows.tolist()]
            labels["text"] = leave_unset(texts, self.unset_prob, self._rng(rows))
        if self.space is not None:
            labels["factors"] = torch.from_numpy(self.space.factors_of(rows))
        if self.class_names:
            classes = self._classes[rows]
            labels["class_label"] = torch.from_numpy(classes)
            labels["human_label"] = [self.class_names[number] for number in classes.tolist()]
        return labels


def _pictures(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: expected a folder of images, got nothing. Set path: (or the environment variable DATA_ROOT)."
        )
    found = find_pictures(folder)
    if not found:
        raise UserError(
            f"{folder}: expected images ({', '.join(PICTURE_SUFFIXES)}) in it or its sub-folders, got none."
        )
    return found


def _split_folder(folder: Path, pictures: Sequence[str], split: str | None) -> tuple[str, str | None]:
    """Return the sub-folder of a split (with ``/``, or empty), and the split that remains to be made."""
    split = {"val": "validation", "valid": "validation"}.get(split, split)
    folders = {name.partition("/")[0] for name in pictures if "/" in name}
    if split not in _SPLIT_FOLDERS or "train" not in folders:
        return "", split
    for name in _SPLIT_FOLDERS[split]:
        if name in folders:
            return f"{name}/", None
    raise ConfigError(
        f"split: {split} needs one of the folders {', '.join(_SPLIT_FOLDERS[split])} beside {folder / 'train'}, got "
        "none. Use split: null for all images."
    )


def _column_classes(table: AttributeTable, name: str) -> tuple[dict[int, str], np.ndarray]:
    """Return the classes in a column, and that of each image: integers as they are, else positions in the order."""
    require_choice("label", name, table.columns)
    entries, known = table.column(name), table.words[name]
    if "" in entries:
        raise UserError(
            f"{table.path}: expected an entry in the column {name!r} (label) for every image, got none for "
            f"{table.pictures[entries.index('')]}. Fill it in, or remove the image from the table."
        )
    is_number = all(entry.isascii() and entry.isdigit() for entry in known)
    numbers = {entry: int(entry) if is_number else position for position, entry in enumerate(known)}
    return {number: entry for entry, number in numbers.items()}, np.array([numbers[entry] for entry in entries])


def _table(folder: Path, attributes: AnyPath, pictures: frozenset[str]) -> AttributeTable:
    path = Path(attributes).expanduser()
    if not path.is_file() and (folder / path).is_file():
        path = folder / path
    table = read_table(path)
    missing = [name for name in table.pictures if name not in pictures]
    if missing:
        raise UserError(
            f"{path}: expected the paths of images below {folder}, got {len(missing)} that do not exist, such as "
            f"{missing[0]}."
        )
    if len(table.pictures) < len(pictures):
        logger.info("%s names %d of %d images; the others were left out", path, len(table.pictures), len(pictures))
    return table


def _below(table: AttributeTable, prefix: str) -> AttributeTable:
    """Return the rows of a table whose images are in a sub-folder."""
    positions = [position for position, name in enumerate(table.pictures) if name.startswith(prefix)]
    if not positions:
        raise UserError(f"{table.path}: expected images in {prefix}, got none.")
    return table.select(positions) if prefix else table
