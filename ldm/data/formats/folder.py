"""Data set of a folder of images with an optional table of attributes; it needs no Python code of the user."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.dataset import SPLITS, split_rows
from ldm.data.formats.attribute_tables import AttributeTable, read_table, table_factors
from ldm.data.formats.encoded import EncodedImages
from ldm.data.formats.picture_files import (
    OTHER_SUFFIXES,
    PICTURE_SUFFIXES,
    find_pictures,
    first_names,
    square,
    stretch,
    to_array,
)
from ldm.data.formats.table_columns import Bins, arrange, find_table, read_splits
from ldm.data.formats.table_pictures import match_pictures
from ldm.data.formats.texts import MAX_WORDS, AttributeImages
from ldm.data.memory import DecodedImages
from ldm.data.options import require_choice, require_count
from ldm.data.paths import AnyPath, data_root
from ldm.errors import report_once
from ldm.ranges import Count, Fraction, PositiveInt, Share, Size, Weight
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

BY_FOLDER = "folder"
_FITS = {"crop": square, "random_crop": square, "stretch": stretch}
_CROP_SEED = 11  # random crops have a random stream of their own
_SYNONYMS = {"val": "validation", "valid": "validation"}
# split -> names of its sub-folder, or in the column of splits, in order of preference
_SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation", "test"),
    "evaluation": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}


class ImageFolder(AttributeImages, EncodedImages):
    """Images of a folder and its sub-folders, sorted by path; with a table, the images that it names.

    Every column of the table is an attribute (see ``AttributeTexts`` for the entries of items), unless it is free text:
    then a warning names the column, and the data set has texts but no vocabulary (``free_text``). Columns whose
    combinations all have the same number of images are also factors: then items contain ``factors``, the rows are in
    the order of the factors, and the disentanglement metrics can be computed.

    With ``label``, items contain the class of the image: ``class_label`` (int64) and ``human_label`` (its name).

    Args:
        path: the folder; None takes ``DATA_ROOT``.
        attributes: .csv, .tsv or .json of the attributes (``read_table``), in the folder or beside it; None for none.
        image_size: side of the images in pixels. Images are decoded once if all of them fit in 512 MB.
        fit: "crop" resizes the shorter side (bilinear) and cuts out the centre; "random_crop" cuts out a random part of
            it, for training; "stretch" resizes both sides (bicubic).
        split: null (all), train, validation or test: the sub-folders train, val (valid, validation) and test if the
            folder has them, else the entries of ``split_column``, else see ``split_rows``.
        limit: see ``split_rows``.
        factors: attributes that are factors; null takes all if they make a full product, [] takes none.
        templates: column -> phrase with ``{}`` for the entry, such as ``{size: "{} in size"}``, or a list of phrases,
            of which one is drawn for each text; without a template the text is the entry.
        num_attributes: number of texts per image that the model expects (its units); null takes that of the table.
        name: name of the data set in tables of scores; None takes that of the folder.
        label: "folder" takes the class from the folder of each image, below that of the split: the position of its name
            among the sorted names of all splits (as in ImageNet). The name of a column takes the entry itself if all of
            them are integers from 0, else its position among the sorted entries. null delivers no classes.
        text, phrasing, unset_prob, caption_weights, single_caption_share: see ``AttributeTexts``.
        holdout: share of the combinations of attributes that the training split does not contain, and of which the
            validation split consists, in [0, 1), see ``FactorDataset``. Every word remains in the training split.
        columns: columns that are attributes; null takes all but ``split_column``. Others (identifiers) are ignored.
        bins: column of numbers -> number of bins of equal frequency, or list of edges: ``{age: [18, 40]}`` makes the
            words "below 18", "18 to 40" (without 40) and "40 or more".
        several: column of several labels -> their separator: ``{wears: ";"}`` makes an attribute of each label, such as
            "wears hat" with the words "hat" and "no hat".
        split_column: column of the splits (train, validation or val, test). Words and factors remain those of the whole
            table.
        words_from: other tables, which determine the words and bins: give train and test sets in two tables the same
            list of both.
        max_words: a column with more different entries, and fewer than four images of each on average, is free text.
        background, max_pixels, white_level, damaged: see ``EncodedImages``; "skip" also leaves out rows of the table
            without an image.
        do_augment, repeat, seed, augment: see ``ImageDataset``.

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
        image_size: Size = 64,
        fit: str = "crop",
        split: str | None = None,
        limit: PositiveInt | None = None,
        factors: Sequence[str] | None = None,
        templates: Mapping[str, str | Sequence[str]] | None = None,
        num_attributes: Count | None = None,
        unset_prob: Fraction = 0.0,
        name: str | None = None,
        label: str | None = None,
        text: str | None = "attributes",
        phrasing: str = "random",
        caption_weights: Sequence[Weight] | None = None,
        single_caption_share: Fraction = 0.5,
        holdout: Share = 0.0,
        columns: Sequence[str] | None = None,
        bins: Mapping[str, Bins] | None = None,
        several: Mapping[str, str] | None = None,
        split_column: str | None = None,
        words_from: AnyPath | Sequence[AnyPath] | None = None,
        max_words: Count = MAX_WORDS,
        **options: Any,
    ) -> None:
        require_count("image_size", image_size)
        require_choice("fit", fit, _FITS)
        of_table = {"factors": factors, "templates": templates, "num_attributes": num_attributes, "holdout": holdout}
        of_table |= {"columns": columns, "bins": bins, "several": several, "split_column": split_column}
        of_table |= {"words_from": words_from, "caption_weights": caption_weights, "text: caption": text == "caption"}
        of_table["a label other than 'folder'"] = label not in (None, BY_FOLDER)
        if attributes is None and any(of_table.values()):
            given = ", ".join(option for option, value in of_table.items() if value)
            raise ConfigError(f"{given}: expected a table of attributes, got none. Set attributes: to its path.")
        self.path = data_root() if path is None else Path(path).expanduser()
        self.image_size, self.fit = image_size, fit
        self.name = name or self.path.resolve().name
        self.pictures, self.notes = _pictures(self.path)
        everything = self.pictures
        self.class_names: dict[int, str] = {}
        self._splits: dict[str, str] = {}
        prefix, rest = ("", split) if split_column else _split_folder(self.path, self.pictures, split)
        self._is_split = bool(prefix)
        if holdout and (split_column or prefix):
            raise ConfigError(
                f"holdout: expected splits made by it, got those of {split_column or prefix}. Remove split_column: (or "
                "rename the folder), or set holdout: 0."
            )
        if attributes is not None:
            read = read_table(find_table(self.path, attributes))
            read, notes = match_pictures(read, self.path, self.pictures, options.get("damaged") == "skip")
            self.notes = {**self.notes, **notes}
            if columns is None and split_column:
                columns = [name for name in read.columns if name != split_column]
            others = [words_from] if isinstance(words_from, (str, Path)) else words_from or []
            references = [read_table(find_table(self.path, other)) for other in others]
            table = _below(arrange(read, references, columns, bins, several), prefix)
            table = self._use(table, factors, num_attributes)
            texts = {"text": text, "phrasing": phrasing, "unset_prob": unset_prob, "caption_weights": caption_weights}
            texts |= {"single_caption_share": single_caption_share, "holdout": holdout}
            self.use_table(table, max_words, templates or {}, **texts)
            if self.missing_vocabulary:
                logger.warning("%s; until then, the data set has no vocabulary", self.missing_vocabulary)
            if split_column:
                self._splits = read_splits(read, split_column, _SPLIT_FOLDERS)
        else:
            read, self.pictures = None, [name for name in self.pictures if name.startswith(prefix)]
        if label is not None:
            found = None if label == BY_FOLDER else _column_classes(_below(read, prefix), label, self.pictures)
            self.class_names, self._classes = found or self._folder_classes(everything, bool(prefix))
        self._decoded = DecodedImages(len(self.pictures), image_size)
        self.in_memory = fit != "random_crop" and self._decoded.fits
        super().__init__(rows=self.rows_of(rest, limit), **options)

    def rows_of(self, split: str | None, limit: int | None = None) -> np.ndarray:
        """See ``ImageDataset``; all splits of the images of a sub-folder are these images."""
        if self._splits:
            return self.without_skipped(self._listed_rows(split, limit))
        if self._is_split:
            require_choice("split", split, SPLITS)
            split = None
        if self.holdout:
            return super().rows_of(split, limit)
        return self.without_skipped(split_rows(len(self.pictures), split, limit))

    def _use(self, table: AttributeTable, factors: Sequence[str] | None, expected: int | None) -> AttributeTable:
        """Set the factors of a table; return it in the order of the rows."""
        found = None if factors is not None and not factors else table_factors(table, factors)
        if found is not None:
            space, table = found
            self.space = space.named(self.name)
        if expected not in (None, len(table.columns)):
            raise UserError(
                f"{table.path}: expected {expected} attributes, got {len(table.columns)} ({', '.join(table.columns)}). "
                "Set num_attributes and the model's latent_unit to the number of columns."
            )
        self.pictures = list(table.pictures)
        return table

    def _listed_rows(self, split: str | None, limit: int | None) -> np.ndarray:
        split = _SYNONYMS.get(split, split)
        require_choice("split", split, SPLITS)
        entries = np.array([self._splits[name] for name in self.pictures])
        names = _SPLIT_FOLDERS.get(split, ())
        name = next((name for name in names if name in entries), None)
        if names and name is None:
            raise ConfigError(
                f"split: {split} needs one of {', '.join(names)} in split_column, got none. Use split: null."
            )
        rows = np.flatnonzero(entries == name) if names else np.arange(len(entries))
        return rows[split_rows(len(rows), "test", limit)]

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
        if self.fit != "random_crop":
            return self._decoded.read(rows, self._image)
        offsets = self._rng(rows, _CROP_SEED).random((len(rows), 2)).tolist()
        return np.stack([self._image(row, offset=offset) for row, offset in zip(rows.tolist(), offsets)])

    @property
    def random_options(self) -> tuple[str, ...]:
        return (*super().random_options, *(["fit: random_crop"] if self.fit == "random_crop" else []))

    def _image(self, row: int, **options: Any) -> np.ndarray:
        return to_array(_FITS[self.fit](self.decode(row), self.image_size, **options))

    def encoded(self, row: int) -> Path:
        return self.path / self.pictures[row]

    def image_name(self, row: int) -> str:
        return str(self.encoded(row))

    def sources(self) -> list[Path]:
        return [self.path / name for name in self.pictures]

    def row_name(self, row: int) -> str:
        return (self.path / self.pictures[row]).as_posix()

    def labels(self, rows: np.ndarray) -> dict[str, Any]:
        """Return attributes, texts, factors and classes of rows, if the data set has them."""
        labels = super().labels(rows)
        if self.space is not None:
            labels["factors"] = torch.from_numpy(self.space.factors_of(rows))
        if self.class_names:
            classes = self._classes[rows]
            labels["class_label"] = torch.from_numpy(classes)
            labels["human_label"] = [self.class_names[number] for number in classes.tolist()]
        return labels


def _pictures(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the images below a folder, and notes on those in formats that are not read, which are logged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of images, got nothing. Set path: (or the variable DATA_ROOT).")
    everything = find_pictures(folder, PICTURE_SUFFIXES + OTHER_SUFFIXES)
    found = [name for name in everything if name.lower().endswith(PICTURE_SUFFIXES)]
    others = [name for name in everything if not name.lower().endswith(PICTURE_SUFFIXES)]
    files = first_names(others)
    if not found:
        more = f" but of other formats: {files}. Convert them to PNG or JPEG" if others else ""
        raise UserError(f"{folder}: expected images ({', '.join(PICTURE_SUFFIXES)}) in it or below it, got none{more}.")
    if others:
        report_once(f"{folder}: images of other formats were not read: {files}. Convert them to PNG or JPEG")
    return found, {"images not read": f"{files}, of other formats"} if others else {}


def _split_folder(folder: Path, pictures: Sequence[str], split: str | None) -> tuple[str, str | None]:
    """Return the sub-folder of a split (with ``/``, or empty), and the split that remains to be made."""
    split = _SYNONYMS.get(split, split)
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


def _column_classes(table: AttributeTable, name: str, pictures: Sequence[str]) -> tuple[dict[int, str], np.ndarray]:
    """Return the classes in a column, and that of each picture: integers as they are, else positions in the order."""
    require_choice("label", name, table.columns)
    entries, known = dict(zip(table.pictures, table.column(name))), table.words[name]
    if empty := [picture for picture, entry in entries.items() if not entry]:
        raise UserError(
            f"{table.path}: expected an entry in the column {name!r} (label) for every image, got none for {empty[0]}. "
            "Fill it in, or remove the image from the table."
        )
    is_integer = all(entry.isascii() and entry.isdigit() for entry in known)
    numbers = {entry: int(entry) if is_integer else position for position, entry in enumerate(known)}
    classes = np.array([numbers[entries[picture]] for picture in pictures])
    return {number: entry for entry, number in numbers.items()}, classes


def _below(table: AttributeTable, prefix: str) -> AttributeTable:
    """Return the rows of a table whose images are in a sub-folder."""
    positions = [position for position, name in enumerate(table.pictures) if name.startswith(prefix)]
    if not positions:
        raise UserError(f"{table.path}: expected images in {prefix}, got none.")
    return table.select(positions) if prefix else table
