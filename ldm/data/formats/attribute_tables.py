"""Tables of attributes as people keep them, CSV or JSON; and the factors they make."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.data.vocabulary import AttributeVocabulary
from ldm.util import ConfigError, UserError, did_you_mean

logger = logging.getLogger(__name__)

MOST_WORDS = 64  # a column with more different entries is free text
INSTANCE = "instance"  # what is left when all factors of a picture are known


@dataclass(frozen=True)
class AttributeTable:
    """U attributes of N pictures.

    Attributes:
        path: of the file, for messages.
        columns: names of the attributes.
        pictures: name of each picture.
        cells: for each picture its U entries; "" where an attribute is unknown.
        words: the different entries of each column in the whole file, unknown ones left out; numbers by size, words
            by the alphabet.
    """

    path: Path
    columns: tuple[str, ...]
    pictures: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    words: dict[str, list[str]]

    def select(self, positions: Sequence[int]) -> AttributeTable:
        """The table of some pictures, in the order given; words stay those of the file."""
        pictures, cells = (tuple(kept[i] for i in positions) for kept in (self.pictures, self.cells))
        return replace(self, pictures=pictures, cells=cells)

    def column(self, name: str) -> list[str]:
        """All entries of one attribute."""
        place = self.columns.index(name)
        return [row[place] for row in self.cells]


def read_table(path: Path) -> AttributeTable:
    """Read a table.

    A .csv has a header; the picture's name stands in the column ``path``, else in the first one, and every other column
    is an attribute. A .json is an object: ``{"a.png": ["red floor", ...], ...}`` or
    ``{"a.png": {"floor": "red", ...}, ...}``.

    Raises:
        UserError: missing or malformed file; the line or name is told.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path} cannot be read ({err}); expected a UTF-8 .csv or .json of attributes") from err
    readers = {".json": _from_json, ".csv": _from_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is a {path.suffix or 'nameless'} file; expected .csv or .json")
    columns, rows = readers[path.suffix.lower()](path, text)
    twice = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if twice:
        raise UserError(f"{path} names {twice[0]!r} more than once; expected each picture once")
    pictures, cells = zip(*rows)
    words = {name: _sorted(set(entries) - {""}) for name, entries in zip(columns, zip(*cells))}
    return AttributeTable(path, tuple(columns), pictures, cells, words)


def _sorted(entries: set[str]) -> list[str]:
    try:
        return sorted(entries, key=float)
    except ValueError:
        return sorted(entries)


def _from_json(path: Path, text: str) -> tuple[Sequence[str], list[tuple[str, tuple[str, ...]]]]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as err:
        raise UserError(f"{path} is not JSON ({err})") from err
    if not isinstance(table, dict) or not table:
        raise UserError(f'{path} holds a {type(table).__name__}; expected an object {{"name.png": ["text", ...]}}')
    first = next(iter(table.values()))
    columns = list(first) if isinstance(first, dict) else None
    rows = []
    for name, entries in table.items():
        if isinstance(entries, dict) and columns is not None and set(entries) == set(columns):
            entries = [entries[column] for column in columns]
        if not isinstance(entries, list) or not all(isinstance(entry, (str, int, float)) for entry in entries):
            wanted = "a list of strings" if columns is None else f"an object with the keys {', '.join(columns)}"
            raise UserError(f"{path}: {name!r} holds {entries!r}; expected {wanted}")
        rows.append((name, tuple(str(entry) for entry in entries)))
    width = len(rows[0][1])
    for name, entries in rows:
        if len(entries) != width:
            raise UserError(
                f"{path}: {name!r} has {len(entries)} attributes, the ones before have {width}; give every "
                "picture as many (an empty one where it is unknown)"
            )
    return columns or [f"attribute {number}" for number in range(1, width + 1)], rows


def _from_csv(path: Path, text: str) -> tuple[Sequence[str], list[tuple[str, tuple[str, ...]]]]:
    lines = list(csv.reader(io.StringIO(text)))
    if len(lines) < 2 or len(lines[0]) < 2:
        raise UserError(
            f"{path}: expected a header (image, attribute, ...) and a line per picture; found {len(lines)} lines"
        )
    header = [name.strip() for name in lines[0]]
    place = header.index("path") if "path" in header else 0
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} columns, the header has {len(header)}")
        cells = [cell.strip() for cell in line]
        rows.append((cells.pop(place), tuple(cells)))
    columns = header[:place] + header[place + 1 :]
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two columns have the same name, found {', '.join(columns)}")
    return columns, rows


@dataclass(frozen=True)
class TableFactors:
    """Factors that a table makes, if it holds every combination of some columns equally often.

    Attributes:
        space: the factors; the last one, not to be recovered, counts the pictures of one combination if there are
            several.
        order: (N,) positions in the table of the rows of ``space``.
    """

    space: FactorSpace
    order: list[int]


def table_factors(table: AttributeTable, names: Sequence[str] | None = None) -> TableFactors | None:
    """The factors in a table.

    Args:
        table: of the attributes.
        names: columns that are factors; None tries all of them and gives up quietly.

    Returns:
        None where ``names`` is None and the columns do not make a full product.

    Raises:
        ConfigError: an unknown column.
        UserError: columns named as factors that do not make a full product.
    """
    for name in names or ():
        if name not in table.columns:
            raise ConfigError(f"factors: {_no_column(table, name)}")
    columns = list(table.columns if names is None else names)
    words = [table.words[name] for name in columns]
    problem = _problem(table, columns, words)
    if problem and names is None:
        logger.info("%s: no factors for the metrics (%s)", table.path, problem)
        return None
    if problem:
        raise UserError(
            f"{table.path}: {problem}; metrics draw pictures of every combination of the factors "
            f"{', '.join(columns)}. Name fewer columns in factors:, or complete the pictures"
        )
    numbers = [{word: number for number, word in enumerate(known)} for known in words]
    entries = zip(*(table.column(name) for name in columns))
    factors = np.array([[number[word] for number, word in zip(numbers, row)] for row in entries])
    sizes = [len(known) for known in words]
    each = len(factors) // math.prod(sizes)
    latent = [k for k, size in enumerate(sizes) if size > 1]  # a factor of one value cannot be recovered
    rows = FactorSpace(columns, sizes).index_of(factors)
    if each > 1:
        columns, sizes = [*columns, INSTANCE], [*sizes, each]
    return TableFactors(FactorSpace(columns, sizes, latent), np.argsort(rows, kind="stable").tolist())


def _no_column(table: AttributeTable, name: str) -> str:
    hint = did_you_mean(name, table.columns)
    return f"{table.path} has no column {name!r}.{hint} Known: {', '.join(table.columns)}"


def _problem(table: AttributeTable, columns: Sequence[str], words: Sequence[Sequence[str]]) -> str | None:
    """What keeps columns from being factors."""
    if not columns or max(map(len, words)) < 2:
        return "no column has two different entries"
    entries = list(zip(*map(table.column, columns)))
    for name, known in zip(columns, words):
        if "" in table.column(name):
            return f"the column {name!r} has empty entries"
        if len(known) == len(entries):
            return f"the column {name!r} names every picture differently"
    counts, product = Counter(entries), math.prod(map(len, words))
    if len(counts) == product and len(set(counts.values())) == 1:
        return None
    if len(counts) == product:
        rare, often = (one(counts, key=counts.get) for one in (min, max))
        return f"{' + '.join(rare)} has {counts[rare]} pictures, {' + '.join(often)} has {counts[often]}"
    missing = next(combination for combination in itertools.product(*words) if combination not in counts)
    return f"of {product} combinations {product - len(counts)} have no picture, such as {' + '.join(missing)}"


def table_vocabulary(table: AttributeTable, templates: Mapping[str, str]) -> AttributeVocabulary | None:
    """Words of all columns; None if a column holds free text, or nothing."""
    words = [table.words[name] for name in table.columns]
    if any(not 1 <= len(known) <= MOST_WORDS for known in words):
        return None
    return AttributeVocabulary(
        factor_names=table.columns,
        words=words,
        value_to_word=[range(len(known)) for known in words],
        templates=[[templates.get(name, "{}")] for name in table.columns],
    )


def table_texts(table: AttributeTable, templates: Mapping[str, Any]) -> list[list[str]]:
    """The U texts of every picture: its entries, put into their column's template if there is one.

    Raises:
        ConfigError: a template for an unknown column, or without ``{}``.
    """
    for name, template in templates.items():
        if name not in table.columns:
            raise ConfigError(f"templates: {_no_column(table, name)}")
        if not isinstance(template, str) or template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ConfigError(f"templates.{name} needs exactly one '{{}}' for the entry, found {template!r}")
    forms = [templates.get(name, "{}") for name in table.columns]
    return [[form.replace("{}", entry) if entry else "" for form, entry in zip(forms, row)] for row in table.cells]
