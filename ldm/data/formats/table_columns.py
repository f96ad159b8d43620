"""Attributes that options make of the columns of a table: a choice of columns, bins of numbers, several labels."""

from __future__ import annotations

import bisect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ldm.data.formats.attribute_tables import AttributeTable, is_number, sort_words
from ldm.data.options import require_choice
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

Bins = int | Sequence[float]


class _Attribute(NamedTuple):
    """An attribute, and how its words follow from the entries of a column."""

    name: str
    words: list[str]  # in order; those that no image of the reference has are left out later
    word_of: Callable[[str], str]  # of an entry that is not empty


def arrange(
    table: AttributeTable,
    references: Sequence[AttributeTable] = (),
    columns: Sequence[str] | None = None,
    bins: Mapping[str, Bins] | None = None,
    several: Mapping[str, str] | None = None,
) -> AttributeTable:
    """Return the table of the attributes that options make of the columns.

    Args:
        table: the table as it was read.
        references: tables with the same columns that determine words and edges of bins; empty for ``table`` itself.
        columns: the columns to use; None takes all.
        bins: column of numbers -> number of bins with equal frequencies, or the edges between bins.
        several: column of several labels -> their separator; each label becomes an attribute ``COLUMN LABEL`` with the
            words ``LABEL`` and ``no LABEL``.

    Raises:
        ConfigError: a column is unknown, or an option is not of the form above.
        UserError: an entry is not a number, or not among those of the references.
    """
    columns = list(table.columns) if columns is None else list(columns)
    bins, several = bins or {}, dict(several or {})
    for option, names in {"columns": columns, "bins": bins, "several": several}.items():
        for name in names:
            require_choice(option, name, table.columns if option == "columns" else columns)
    if not columns or len(set(columns)) < len(columns) or set(bins) & set(several):
        raise ConfigError(
            f"columns: expected different columns, each in bins or in several; got {columns}, bins: {[*bins]}, "
            f"several: {[*several]}."
        )
    for other in references:
        if missing := [name for name in columns if name not in other.columns]:
            raise UserError(f"{other.path}: expected the columns of {table.path}, got none named {missing[0]!r}.")
    used = references or [table]
    made = [(name, part) for name in columns for part in _attributes(table, used, name, bins, several)]
    names = [part.name for _, part in made]
    if len(set(names)) < len(names):
        raise ConfigError(f"several: expected attributes with different names, got {', '.join(names)}.")
    found = {part.name: {part.word_of(entry) for other in used for entry in other.words[name]} for name, part in made}
    words = {part.name: [word for word in part.words if word in found[part.name]] for _, part in made}
    cells = [_entries(table, name, part, words[part.name], references) for name, part in made]
    sources = {part.name: name for name, part in made}
    count = sum(len(other.pictures) for other in used)
    return replace(table, columns=tuple(names), cells=tuple(zip(*cells)), words=words, sources=sources, num_known=count)


def _attributes(
    table: AttributeTable, used: Sequence[AttributeTable], name: str, bins: Mapping[str, Bins], several: dict[str, str]
) -> list[_Attribute]:
    if name in bins:
        for other in {id(other): other for other in (table, *used)}.values():
            _check_numbers(other, name)
        edges = _edges(used, name, bins[name])
        words = _words_of_bins(edges)
        return [_Attribute(name, words, lambda entry: words[bisect.bisect_right(edges, float(entry))])]
    if name not in several:
        return [_Attribute(name, sort_words({word for other in used for word in other.words[name]}), str)]
    separator = several[name]
    if not isinstance(separator, str) or not separator.strip():
        raise ConfigError(f"several.{name}: expected the separator of the labels, such as ';', got {separator!r}.")
    labels = sort_words({label for other in used for entry in other.words[name] for label in _split(entry, separator)})
    if not labels:
        raise UserError(f"{used[0].path}: expected labels in the column {name!r}, got none.")

    def has(label: str) -> Callable[[str], str]:
        return lambda entry: label if label in _split(entry, separator) else f"no {label}"

    return [_Attribute(f"{name} {label}", [f"no {label}", label], has(label)) for label in labels]


def _split(entry: str, separator: str) -> set[str]:
    return {label.strip() for label in entry.split(separator)} - {""}


def _check_numbers(table: AttributeTable, name: str) -> None:
    for number, (picture, entry) in enumerate(zip(table.pictures, table.column(name)), start=1):
        if entry and not is_number(entry):
            raise UserError(
                f"{table.path}, row {number} ({picture}): expected a number in the column {name!r}, got {entry!r}. "
                f"Correct the entry, or remove {name} from bins:."
            )


def _edges(used: Sequence[AttributeTable], name: str, given: Bins) -> list[float]:
    """Return the edges between the bins of a column, in ascending order."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 2:
        numbers = sorted(float(entry) for other in used for entry in other.column(name) if entry)
        found = sorted({numbers[len(numbers) * i // given] for i in range(1, given) if numbers} - set(numbers[:1]))
        if not found:
            raise UserError(f"{used[0].path}: expected different numbers in the column {name!r} (bins), got only one.")
        if len(found) < given - 1:
            message = "%s: the column %r was divided into %d bins instead of %d, because many of its numbers are equal"
            logger.warning(message, used[0].path, name, len(found) + 1, given)
        return found
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not is_list or not all(isinstance(edge, (int, float)) and math.isfinite(edge) for edge in given):
        raise ConfigError(f"bins.{name}: expected a number of bins (at least 2) or a list of edges, got {given!r}.")
    if any(low >= high for low, high in zip(given, given[1:])):
        raise ConfigError(f"bins.{name}: expected edges in ascending order, got {list(given)}.")
    return [float(edge) for edge in given]


def _words_of_bins(edges: Sequence[float]) -> list[str]:
    shown = [str(int(edge)) if edge == int(edge) else repr(edge) for edge in edges]
    between = [f"{low} to {high}" for low, high in zip(shown, shown[1:])]
    return [f"below {shown[0]}", *between, f"{shown[-1]} or more"]


def _entries(
    table: AttributeTable, name: str, part: _Attribute, words: Sequence[str], references: Sequence[AttributeTable]
) -> list[str]:
    """Return the word of an attribute for every image of the table; "" if it is unknown."""
    by_entry = {entry: part.word_of(entry) for entry in table.words[name]}
    for entry, word in by_entry.items():
        if word not in words:
            files = ", ".join(str(other.path) for other in references)
            raise UserError(
                f"{table.path}: expected the words of {files} in the column {name!r} ({', '.join(words[:10])}), got "
                f"{entry!r} for {table.pictures[table.column(name).index(entry)]}. Add {table.path} to words_from:."
            )
    return [by_entry[entry] if entry else "" for entry in table.column(name)]


def free_text(table: AttributeTable, max_words: int) -> str:
    """Return the reason why a table does not give a vocabulary: columns of free text, or without entries; else "".

    A column is free text if it has more than ``max_words`` different entries and fewer than four images of each.
    """
    most = max(max_words, table.num_known // 4)
    wrong = {name: len(words) for name, words in table.words.items() if not 1 <= len(words) <= most}
    if not wrong:
        return ""
    name, count = next(iter(wrong.items()))
    more = f" (and {len(wrong) - 1} more columns)" if len(wrong) > 1 else ""
    if not count:
        return f"{table.path}: the column {name!r} has no entries{more}. Remove it, or list the wanted ones in columns:"
    good = [source for source in dict.fromkeys(table.sources.values()) if source not in wrong]
    numeric = f"bin its numbers (bins: {{{name}: 4}}), " if all(map(is_number, table.words[name])) else ""
    return (
        f"{table.path}: the column {name!r}{more} has {count} different entries, more than the {most} of an attribute "
        f"(max_words, or a quarter of the {table.num_known} images). Remove the column, list the wanted ones (columns: "
        f"[{', '.join(good)}]), {numeric}or raise max_words"
    )


def read_splits(table: AttributeTable, name: str, known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the entry of each image in the column of splits, in lower case.

    Args:
        table: the table as it was read.
        name: the column.
        known: names of each split.

    Raises:
        ConfigError: the column is unknown.
        UserError: an entry is not the name of a split.
    """
    require_choice("split_column", name, table.columns)
    entries = [entry.lower() for entry in table.column(name)]
    names = {"", *(other for others in known.values() for other in others)}
    for number, (picture, entry) in enumerate(zip(table.pictures, entries), start=1):
        if entry not in names:
            raise UserError(
                f"{table.path}, row {number} ({picture}): expected one of {', '.join(sorted(names - {''}))} in the "
                f"column {name!r} (split_column), got {entry!r}."
            )
    return dict(zip(table.pictures, entries))


def find_table(folder: Path, path: str | Path) -> Path:
    """Return the path of a table, as given or relative to the folder of images."""
    path = Path(path).expanduser()
    return folder / path if not path.is_file() and (folder / path).is_file() else path
