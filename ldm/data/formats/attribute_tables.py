"""Tables of attributes, CSV or JSON, and the factors and words in them."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.data.options import require_choice
from ldm.data.rows import readable
from ldm.data.vocabulary import UNKNOWN
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

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

    def select(self, positions: Sequence[int]) -> AttributeTable:
        """Return the table of some images, in the given order; words remain those of the file."""
        pictures, cells = (tuple(rows[i] for i in positions) for rows in (self.pictures, self.cells))
        return replace(self, pictures=pictures, cells=cells)

    def column(self, name: str) -> list[str]:
        """Return all entries of one attribute."""
        position = self.columns.index(name)
        return [row[position] for row in self.cells]


def read_table(path: Path) -> AttributeTable:
    """Read a table.

    A .csv has a header; the name of the image is in the column ``path``, else in the first one, and every other column
    is an attribute. A .json is an object: ``{"a.png": ["red cube", ...], ...}`` or ``{"a.png": {"hue": "red", ...},
    ...}``. Empty cells and null are unknown.

    Raises:
        UserError: the file is missing or malformed; the message names the line or image.
    """
    with readable(path, "UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
    readers = {".json": _from_json, ".csv": _from_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: expected a .csv or .json of attributes, got {path.suffix or 'no suffix'}.")
    columns, rows = readers[path.suffix.lower()](path, text)
    twice = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if twice:
        raise UserError(f"{path}: expected each image once, got {twice[0]!r} more than once.")
    pictures, cells = zip(*rows)
    return make_table(path, columns, pictures, cells)


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


def _from_json(path: Path, text: str) -> tuple[Sequence[str], list[tuple[str, tuple[str, ...]]]]:
    with readable(path, "JSON"):
        table = json.loads(text)
    if not isinstance(table, dict) or not table:
        raise UserError(f'{path}: expected an object {{"name.png": ["text", ...]}}, got a {type(table).__name__}.')
    first = next(iter(table.values()))
    columns = list(first) if isinstance(first, dict) else None
    rows = []
    for name, entries in table.items():
        if isinstance(entries, dict) and columns is not None and set(entries) == set(columns):
            entries = [entries[column] for column in columns]
        if not isinstance(entries, list) or not all(
            isinstance(entry, (str, int, float, type(None))) for entry in entries
        ):
            wanted = "a list of strings" if columns is None else f"an object with the keys {', '.join(columns)}"
            raise UserError(f"{path}: expected {wanted} for {name!r}, got {entries!r}.")
        rows.append((name, tuple("" if entry is None else str(entry).strip() for entry in entries)))
    width = len(rows[0][1])
    for name, entries in rows:
        if len(entries) != width:
            raise UserError(
                f"{path}: expected {width} attributes for {name!r}, as for the images before it, got {len(entries)}. "
                "Give every image the same number (an empty one if it is unknown)."
            )
    return columns or [f"attribute {number}" for number in range(1, width + 1)], rows


def _from_csv(path: Path, text: str) -> tuple[Sequence[str], list[tuple[str, tuple[str, ...]]]]:
    with readable(path, "CSV", csv.Error):
        reader = csv.reader(io.StringIO(text))
        lines = [(reader.line_num, line) for line in reader if line]
    header = [name.strip() for name in lines[0][1]] if lines else []
    if len(lines) < 2 or len(header) < 2:
        raise UserError(
            f"{path}: expected a header (image, attribute, ...) and one line per image, with commas between the cells; "
            f"got {len(lines)} lines and the header {', '.join(header)!r}."
        )
    position = header.index("path") if "path" in header else 0
    rows = []
    for number, line in lines[1:]:
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: expected {len(header)} columns as in the header, got {len(line)}.")
        cells = [cell.strip() for cell in line]
        rows.append((cells.pop(position), tuple(cells)))
    columns = header[:position] + header[position + 1 :]
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: expected columns with different names, got {', '.join(columns)}.")
    return columns, rows


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
        _report_once(f"{table.path}: no factors for the metrics ({problem})")
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


@functools.cache
def _report_once(message: str) -> None:
    """Log a message once; a run opens its table for each of its data sets."""
    logger.info("%s", message)


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
