"""Images that the rows of a table of attributes name, in the spellings of other systems and programs."""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ldm.data.formats.attribute_tables import AttributeTable, merge_rows
from ldm.data.formats.picture_files import PICTURE_SUFFIXES, first_names
from ldm.errors import report_once
from ldm.util import UserError, did_you_mean

_MOST_COMPARED = 10_000  # names among which a similar one is searched for the message


def match_pictures(
    table: AttributeTable, folder: Path, pictures: Sequence[str], is_skipping: bool = False
) -> tuple[AttributeTable, dict[str, str]]:
    """Replace the names in a table by the paths of the images; rows of one image are merged.

    A name is a path relative to the folder, the table or the working directory, or an absolute one, with ``/`` or
    ``\\``. If there is no such image, accents may be encoded in another way (NFC, NFD), then upper and lower case may
    differ, then the suffix may be missing, provided that only one image fits.

    Args:
        table: the table as it was read.
        folder: the folder of the images.
        pictures: the paths of all images below it.
        is_skipping: leave out rows without an image, with a warning.

    Returns:
        The table, and notes for ``ImageDataset.notes``.

    Raises:
        UserError: a row has no image, or two rows of one image differ.
    """
    known = frozenset(pictures)
    bases = [base.absolute().as_posix() for base in (table.path.parent, Path())]
    roots = [f"{root.as_posix()}/" for root in (folder.absolute(), folder.resolve())]
    found = {name: name for name in table.pictures if name in known}
    for of_name, of_picture in ((_nfc, _nfc), (_fold, _fold), (_nfc, _stem), (_fold, lambda name: _fold(_stem(name)))):
        left = [name for name in table.pictures if name not in found]
        by_form = defaultdict(list)
        for picture in pictures if left else ():
            by_form[of_picture(picture)].append(picture)
        for name in left:
            fitting = (by_form[form] for path in _paths(name, bases, roots) if (form := of_name(path)) in by_form)
            if len(hits := next(fitting, [])) == 1:
                found[name] = hits[0]
    missing = [name for name in table.pictures if name not in found]
    if missing and not (is_skipping and found):
        near = did_you_mean(missing[0], pictures[:_MOST_COMPARED])
        kind = f" Images have the suffixes {', '.join(PICTURE_SUFFIXES)}." if (folder / missing[0]).is_file() else ""
        raise UserError(
            f"{table.path}: expected the paths of images below {folder}, got {len(missing):,} that do not exist, "
            f"such as {', '.join(missing[:3])}.{near}{kind} Correct the table; data sets leave the rows out with "
            "damaged: skip."
        )
    notes = {"rows without an image": first_names(missing)} if missing else {}
    if missing:
        report_once(f"{table.path}: rows without an image were left out: {first_names(missing)}")
    table = table.select([row for row, name in enumerate(table.pictures) if name in found])
    table = merge_rows(replace(table, pictures=tuple(found[name] for name in table.pictures)))
    if unused := sorted(known - set(table.pictures)):
        notes["images without a row"] = first_names(unused)
        count, total = len(table.pictures), len(pictures)
        left_out = f"the others were left out: {first_names(unused)}"
        report_once(f"{table.path} names {count:,} of {total:,} images; {left_out}", logging.INFO)
    return table, notes


def _paths(name: str, bases: Sequence[str], roots: Sequence[str]) -> Iterator[str]:
    """Yield the paths relative to a folder (``roots``, two of its names) that a name may stand for."""
    name = name.replace("\\", "/")
    yield posixpath.normpath(name)
    for base in bases:
        path = posixpath.normpath(posixpath.join(base, name))
        yield from (path[len(root) :] for root in roots if path.startswith(root))


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _fold(name: str) -> str:
    return _nfc(name).casefold()


def _stem(picture: str) -> str:
    return _nfc(posixpath.splitext(picture)[0])
