"""Text and numbers in CSV files as people write them: delimiters, encodings, blank lines, decimal commas."""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ldm.errors import UserError

MISSING_WORDS = frozenset(["", *"nan -nan NaN -NaN NaT NA N/A n/a #N/A #NA <NA> null NULL None".split()])  # no value
DELIMITERS = "\t;,"
SAMPLE_LINES = 50  # lines from which the delimiter is found
EXACT = 2**53  # float64 holds the whole numbers up to it
UNNAMED = re.compile(r"(unnamed: \d+(\.\d+)*)?", re.IGNORECASE)  # as pandas names columns
_NO_TEXT = re.compile("[\0\udc80-\udcff]")  # also the surrogates of bytes that are not UTF-8
_END = "\0end"  # a line behind the last one, which becomes part of a quoted field that has no end
_DECIMAL = re.compile(r"\s*[+-]?\d*,\d+([eE][+-]?\d+)?\s*")


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file: UTF-16 if it begins with the byte order mark of it, else UTF-8."""
    with path.open("rb") as stream:
        return "utf-16" if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def find_delimiter(path: Path) -> str:
    """Return the delimiter that divides all first lines into the same number of fields.

    Raises:
        UserError: two delimiters do, and the fields show that neither is a decimal comma; or numbers are divided by
            spaces.
    """
    with path.open(newline="", encoding=encoding_of(path), errors="replace") as stream:
        sample = [line for line in itertools.islice(stream, SAMPLE_LINES) if line.strip()]
    try:
        fields = {delimiter: list(csv.reader(sample, delimiter=delimiter)) for delimiter in DELIMITERS}
    except csv.Error as error:
        raise ValueError(error) from error
    fitting = [key for key, lines in fields.items() if len(set(map(len, lines))) == 1 and len(lines[0]) > 1]
    if not fitting:  # lines of one field, or of different numbers of fields
        words = sample[-1].split() if sample else []
        if len(words) > 1 and numbers_of(words, ",") is not None:
            raise UserError(f"{path}: expected commas, semicolons or tabs between numbers, got spaces. Replace them.")
        return max(",;\t", key=lambda delimiter: len(fields[delimiter][0]) if sample else 0)
    for word in itertools.chain(*fields[fitting[0]][1:]):
        if any(delimiter in word for delimiter in fitting[1:]) and not _DECIMAL.fullmatch(word):
            both = " and ".join(map(repr, fitting))
            raise UserError(
                f"{path}: {both} both divide the lines into equal numbers of fields. Write one of them only."
            )
    return fitting[0]


def read_lines(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of every line that is not blank; see ``numbered_lines``."""
    return (fields for _, fields in numbered_lines(path, delimiter))


def numbered_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number and fields of every line that is not blank.

    Raises:
        UserError: a line has another number of fields than the first, or is malformed.
    """
    with path.open(newline="", encoding=encoding_of(path), errors="surrogateescape") as stream:
        reader = csv.reader(itertools.chain(stream, [_END]), delimiter=delimiter, skipinitialspace=True)
        width = 0
        try:
            for fields in reader:
                if fields and _END in fields[-1]:
                    if len(fields) > 1 or fields[0] != _END:
                        raise csv.Error("a quote is not closed")
                    return
                if width != 1 and len(fields) < 2 and not "".join(fields).strip() or not fields:
                    continue
                width = width or len(fields)
                if len(fields) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {width} fields as in the first line, got "
                        f"{len(fields)}. Complete the line, or quote fields that contain {delimiter!r}."
                    )
                if _NO_TEXT.search("".join(fields)):
                    raise csv.Error("it contains other bytes")
                yield reader.line_num, [field.strip() for field in fields]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}, line {reader.line_num}: expected text in UTF-8 with complete quotes ({error}). "
                "Write the file again."
            ) from error


def numbers_of(words: Sequence[str], delimiter: str) -> np.ndarray | None:
    """Return the numbers in a column, NaN for fields without a value; None if it contains words.

    A comma is a decimal comma if it is not the delimiter, and if there are no decimal points.
    """
    text = "".join(words)
    if "_" in text or ("," in text and (delimiter == "," or "." in text)):  # float would read 1_2 as 12
        return None
    try:
        values = np.array([math.nan if word in MISSING_WORDS else float(word.replace(",", ".")) for word in words])
    except ValueError:
        return None
    is_rounded = (np.abs(values) > EXACT) & np.isfinite(values)  # long identifiers: float would make them equal
    return None if any(words[row].lstrip("+-").isdigit() for row in np.flatnonzero(is_rounded)) else values
