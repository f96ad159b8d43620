"""Tables of attributes, CSV, TSV or JSON, and the factors and words in them."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.csv_files import MISSING_WORDS, UNNAMED, encoding_of, find_delimiter, numbered_lines
from ldm.data.factors import FactorSpace
from ldm.data.formats.picture_files import PICTURE_SUFFIXES
from ldm.data.options import require_choice
from ldm.data.rows import readable
from ldm.data.vocabulary import UNKNOWN
from ldm.errors import report_once
from ldm.util import ConfigError, UserError

INSTANCE = "instance"  # factor that numbers the images of one combination


@dataclass(frozen=True)
class AttributeTable:
    """U attributes of N images."""

    path: Path  # the file, for messages
    columns: tuple[str, ...]  # names of the attributes
    pictures: tuple[str, ...]  # name of each image
    cells: tuple[tuple[str, ...], ...]  # U entries of each image; "" for an unknown attribute
    words: dict[str, list[str]]  # different known entries of each column in the whole file, sorted as numbers or text
    sources: dict[str, str] = field(default_factory=dict)  # attribute -> column of the file (``arrange``)
    num_known: int = 0  # number of images that the words were taken from (``arrange``)
    places: tuple[str, ...] = ()  # of each image in the file, such as "line 2"

    def select(self, positions: Sequence[int]) -> AttributeTable:
        """Return the table of some images, in the given order; words remain those of the file."""
        fields = {"pictures": self.pictures, "cells": self.cells} | ({"places": self.places} if self.places else {})
        return replace(self, **{name: tuple(rows[i] for i in positions) for name, rows in fields.items()})

    def column(self, name: str) -> list[str]:
        """Return all entries of one attribute."""
        position = self.columns.index(name)
        return [row[position] for row in self.cells]


def read_table(path: Path) -> AttributeTable:
    """Read a table.

    A .csv or .tsv has a header, and commas, semicolons or tabs; the name of the image is in the column ``path``, else
    in the first one, and every other column is an attribute. A .json is an object ``{"a.png": ["red cube", ...], ...}``
    or ``{"a.png": {"hue": "red", ...}, ...}``, or a list of objects, ``[{"path": "a.png", "hue": "red"}, ...]``. Empty
    cells and null are unknown, and so are words such as NaN in a column of numbers. Repeated rows are read once.

    Raises:
        UserError: the file is missing or malformed, or an image has two rows with different entries; the message names
            the line or image.
    """
    readers = {".json": _from_json, ".csv": _from_csv, ".tsv": _from_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .csv, .tsv or .json of attributes, got {path.suffix or 'no suffix'}.")
    with readable(path, "UTF-8"):
        columns, places, pictures, cells = readers[path.suffix.lower()](path)
    if "" in pictures:
        raise UserError(
            f"{path}, {places[pictures.index('')]}: expected the path of an image, got an empty cell. Fill it in."
        )
    table = make_table(path, columns, pictures, list(zip(*map(_without_missing, zip(*cells)))))
    return merge_rows(replace(table, places=tuple(places)))


def _without_missing(column: tuple[str, ...]) -> tuple[str, ...]:
    """Return a column in which words for missing values, such as NaN, are empty if the others are numbers."""
    others = [entry for entry in column if entry not in MISSING_WORDS]
    if not others or len(others) == len(column) or not all(map(is_number, others)):
        return column
    return tuple("" if entry in MISSING_WORDS else entry for entry in column)


def merge_rows(table: AttributeTable) -> AttributeTable:
    """Return the table with the first of equal rows; raise a ``UserError`` if an image has rows that differ."""
    first: dict[str, int] = {}
    for row, name in enumerate(table.pictures):
        if table.cells[other := first.setdefault(name, row)] != table.cells[row]:
            raise UserError(
                f"{table.path}, {table.places[row]}: expected each image once, got {name!r} again, with other entries "
                f"than in {table.places[other]}. Remove one of the two."
            )
    if len(first) == len(table.pictures):
        return table
    name, _ = Counter(table.pictures).most_common(1)[0]
    report_once(f"{table.path}: {len(table.pictures) - len(first)} repeated rows, such as of {name}", logging.INFO)
    return table.select([*first.values()])


def make_table(
    path: Path, columns: Sequence[str], pictures: Sequence[str], cells: Sequence[tuple[str, ...]]
) -> AttributeTable:
    """Return the table of the entries of N images."""
    words = {name: sort_words(set(entries) - {""}) for name, entries in zip(columns, zip(*cells))}
    return AttributeTable(path, tuple(columns), tuple(pictures), tuple(cells), words)


def is_number(entry: str) -> bool:
    """Return whether an entry is a finite number."""
    try:
        return math.isfinite(float(entry))
    except ValueError:
        return False


def sort_words(entries: set[str]) -> list[str]:
    """Return entries in ascending order: as numbers if all are, else as text."""
    is_numeric = all(map(is_number, entries))
    return sorted(entries, key=lambda entry: (float(entry), entry) if is_numeric else entry)


_Content = tuple[Sequence[str], list[str], list[str], list[tuple[str, ...]]]  # columns; place, name, cells of each row


def _from_json(path: Path) -> _Content:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for name, entries in pairs:
            if known.setdefault(name, entries) != entries:
                raise UserError(f"{path}: expected each name once, got {name!r} twice with different entries.")
        return known

    text = path.read_text(encoding=encoding_of(path))
    with readable(path, "JSON", RecursionError):
        content = json.loads(text, object_pairs_hook=unique)
    items = list(content.items()) if isinstance(content, dict) else _named_entries(path, content)
    if not items:
        raise UserError(f'{path}: expected an object {{"name.png": ["text", ...]}}, got an empty one.')
    columns = list(items[0][1]) if isinstance(items[0][1], dict) else None
    rows = []
    for name, entries in items:
        listed = entries if isinstance(entries, (list, dict)) or columns is not None else [entries]
        if isinstance(listed, dict) and columns is not None and set(listed) == set(columns):
            listed = [listed[column] for column in columns]
        if not isinstance(listed, list) or not all(
            isinstance(entry, (str, int, float, type(None))) for entry in listed
        ):
            wanted = "a list of strings" if columns is None else f"an object with the keys {', '.join(columns)}"
            raise UserError(f"{path}: expected {wanted} for {name!r}, got {entries!r}.")
        rows.append(tuple("" if entry is None else str(entry).strip() for entry in listed))
    width = len(rows[0])
    for (name, _), entries in zip(items, rows):
        if len(entries) != width or not width:
            raise UserError(
                f"{path}: expected {width or 'some'} attributes for {name!r}, as for the images before it, got "
                f"{len(entries)}. Give every image the same number (an empty one if it is unknown)."
            )
    names = [name.strip() for name, _ in items]
    places = [f"entry {number}" for number in range(1, len(names) + 1)]
    return columns or [f"attribute {number}" for number in range(1, width + 1)], places, names, rows


def _named_entries(path: Path, content: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return name and entries of each object of a list; the name is under the key ``path``, else the first one."""
    found = f"a {type(content).__name__}"
    if isinstance(content, list) and content and isinstance(content[0], dict) and content[0]:
        key = "path" if "path" in content[0] else next(iter(content[0]))
        wrong = [row for row in content if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if not wrong:
            return [(row[key], {name: entry for name, entry in row.items() if name != key}) for row in content]
        found = f"{wrong[0]!r} without the path of an image under {key!r}"
    raise UserError(
        f'{path}: expected an object {{"name.png": ["text", ...]}}, or a list of objects with the same keys, got '
        f"{found}."
    )


def _from_csv(path: Path) -> _Content:
    lines = [(number, line) for number, line in numbered_lines(path, find_delimiter(path)) if any(line)]
    header = lines[0][1] if lines else []
    if len(lines) < 2 or len(header) < 2:
        raise UserError(
            f"{path}: expected a header (image, attribute, ...) and one line per image, with commas, semicolons or "
            f"tabs between the cells; got {max(len(lines) - 1, 0)} lines below the header {', '.join(header)!r}"
            f"{' and no column of attributes' if len(header) == 1 < len(lines) else ''}."
        )
    columns, num_rows = list(zip(*(line for _, line in lines[1:]))), len(lines) - 1
    numbers = [("",) * num_rows, *(tuple(str(rank + start) for rank in range(num_rows)) for start in (0, 1))]
    used = [k for k, name in enumerate(header) if not (UNNAMED.fullmatch(name) and columns[k] in numbers)]
    used = used if len(used) > 1 else [*range(len(header))]
    position = next((k for k in used if header[k] == "path"), used[0])
    if header[position].lower().endswith(PICTURE_SUFFIXES):
        raise UserError(
            f"{path}, line {lines[0][0]}: expected a header (image, attribute, ...), got the row of an image "
            f"({header[position]}). Add a first line with the names of the columns."
        )
    used.remove(position)
    names = [header[k] for k in used]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected columns with different names, got {', '.join(names)}.")
    places = [f"line {number}" for number, _ in lines[1:]]
    return names, places, list(columns[position]), list(zip(*(columns[k] for k in used)))


def table_factors(
    table: AttributeTable, names: Sequence[str] | None = None
) -> tuple[FactorSpace, AttributeTable] | None:
    """Return the factors of a table that contains every combination of some columns the same number of times.

    Args:
        table: the table.
        names: columns that are factors; None tries all and may return None.

    Returns:
        The space, and the table in the order of its rows. If a combination has several images, a last factor numbers
        them and is not latent.

    Raises:
        ConfigError: a column is unknown.
        UserError: the named columns do not make a full product.
    """
    for name in names or ():
        require_choice("factors", name, table.columns)
    columns = list(table.columns if names is None else names)
    words = [table.words[name] for name in columns]
    problem = _problem(table, columns, words)
    if problem and names is None:
        report_once(f"{table.path}: no factors for the metrics ({problem})", logging.INFO)
        return None
    if problem:
        raise UserError(
            f"{table.path}: expected the same number of images for every combination of the factors "
            f"{', '.join(columns)}; {problem}. Name fewer columns in factors:, or add the missing images."
        )
    numbers = [{word: number for number, word in enumerate(known)} for known in words]
    entries = zip(*(table.column(name) for name in columns))
    factors = np.array([[number[word] for number, word in zip(numbers, row)] for row in entries])
    sizes = [len(known) for known in words]
    each = len(factors) // math.prod(sizes)
    latent = [k for k, size in enumerate(sizes) if size > 1]  # a factor with one value cannot be recovered
    rows = FactorSpace(columns, sizes).index_of(factors)
    if each > 1:
        columns, sizes = [*columns, INSTANCE], [*sizes, each]
    return FactorSpace(columns, sizes, latent), table.select(np.argsort(rows, kind="stable").tolist())


def _problem(table: AttributeTable, columns: Sequence[str], words: Sequence[Sequence[str]]) -> str | None:
    """Return the reason why columns are not factors, or None."""
    if not columns or max(map(len, words)) < 2:
        return "no column has two different entries"
    entries = list(zip(*map(table.column, columns)))
    for name, known in zip(columns, words):
        if "" in table.column(name):
            return f"the column {name!r} has empty entries"
        if len(known) == len(entries):
            return f"the column {name!r} has another entry for every image"
    counts, product = Counter(entries), math.prod(map(len, words))
    if len(counts) == product and len(set(counts.values())) == 1:
        return None
    if len(counts) == product:
        rare, often = (one(counts, key=counts.get) for one in (min, max))
        return f"{' + '.join(rare)} has {counts[rare]} images, {' + '.join(often)} has {counts[often]}"
    missing = next(combination for combination in itertools.product(*words) if combination not in counts)
    return f"of {product} combinations {product - len(counts)} have no image, such as {' + '.join(missing)}"


def table_phrases(table: AttributeTable, templates: Mapping[str, str | Sequence[str] | None]) -> list[list[str]]:
    """Return the templates of every attribute, the canonical one first; by default the entry itself.

    Args:
        table: the table.
        templates: attribute, or column that several labels were taken from -> one or more phrases with ``{}``.

    Raises:
        ConfigError: there is no such attribute, or a template does not have exactly one ``{}``.
    """
    known = [*dict.fromkeys([*table.columns, *table.sources.values()])]
    listed = {name: [given] if isinstance(given, str) else given for name, given in templates.items()}
    for name, phrases in listed.items():
        require_choice("templates", name, known)
        for phrase in phrases if isinstance(phrases, Sequence) and phrases else [phrases] * (phrases is not None):
            if not isinstance(phrase, str) or phrase.count("{}") != 1:
                raise ConfigError(f"templates.{name}: expected exactly one '{{}}' for the entry, got {phrase!r}.")
    return [list(listed.get(name) or listed.get(table.sources.get(name, name)) or ["{}"]) for name in table.columns]


def table_values(table: AttributeTable) -> np.ndarray:
    """Return the position of every entry among the words of its column, (N, U) int64; ``UNKNOWN`` for "".

    The positions are the values of the vocabulary.
    """
    numbers = [{"": UNKNOWN} | {word: k for k, word in enumerate(table.words[name])} for name in table.columns]
    return np.array([[number[entry] for number, entry in zip(numbers, row)] for row in table.cells], dtype=np.int64)


def table_texts(table: AttributeTable, phrases: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the U texts of every image: its entries, each in the first template of its column."""
    forms = [templates[0] for templates in phrases]
    return [[form.replace("{}", entry) if entry else "" for form, entry in zip(forms, row)] for row in table.cells]


def held_out_combinations(values: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draw combinations of values of a table that training leaves out, such that every value is still trained on.

    Args:
        values: (N, U) int64; images with an ``UNKNOWN`` value are never held out.
        share: share of the different combinations.
        seed: seed of the draw.

    Returns:
        (M, U) int64, sorted.
    """
    known = values[(values != UNKNOWN).all(axis=1)]
    combinations, counts = np.unique(known, axis=0, return_counts=True)
    left = [np.bincount(column[column != UNKNOWN]) for column in values.T]
    held_out, wanted = [], max(1, round(share * len(combinations)))
    for index in np.random.RandomState(seed).permutation(len(combinations)):
        row = combinations[index]
        if len(held_out) == wanted:
            break
        if all(left[k][value] > counts[index] for k, value in enumerate(row)):
            held_out.append(index)
            for k, value in enumerate(row):
                left[k][value] -= counts[index]
    return combinations[np.sort(np.array(held_out, dtype=np.int64))]
