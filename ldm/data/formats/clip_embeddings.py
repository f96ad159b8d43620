"""CLIP image embeddings in a file, and data sets whose items contain them.

The format follows from the suffix:

* .safetensors and .h5: ``embeddings`` (n, D) float32, and ``record``, the bytes of a JSON text;
* .csv: no header, one row per image (path, f1, ..., fD); the record is in ``<name>.csv.json``.

The record contains ``clip`` (its name), ``fingerprint`` (``weights_fingerprint``) and ``hashes`` (name of each image ->
hash of the image). A .csv of another program has none; then only paths and widths are checked.

Legend: n rows, D width of an embedding.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ldm.data.dataset import ImageDataset
from ldm.data.formats.image_sources import H5_SUFFIXES
from ldm.data.formats.picture_files import decode_picture
from ldm.data.paths import AnyPath
from ldm.data.rows import explained_writing, readable
from ldm.data.traits import unwrap
from ldm.util import ConfigError, UserError, atomic_write, csv_cell, csv_text, instantiate_from_config

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".safetensors", *H5_SUFFIXES)
COMMAND = "python scripts/preprocess_clip.py"
_CHECKED = 32  # at most so many images of a data set are compared with their hashes


@dataclass
class EmbeddingTable:
    """Content of a file of embeddings.

    Attributes:
        path: the file.
        names: n names of images, see ``ImageDataset.row_name``.
        values: (n, D) float32.
        record: see the module docstring; empty for a .csv of another program.
    """

    path: Path
    names: list[str]
    values: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D."""
        return self.values.shape[1]

    def require_clip(self, name: str, fingerprint: str, width: int) -> None:
        """Raise a ``UserError`` unless the embeddings are those of a CLIP; without a record, compare the width."""
        known = self.record.get("fingerprint")
        if known not in (None, fingerprint) or width != self.width:
            found = "" if known is None else f", fingerprint {known}"
            raise UserError(
                f"{self.path}: expected embeddings of the CLIP {name} ({width} wide, fingerprint {fingerprint}), got "
                f"those of {self.record.get('clip', 'an unknown CLIP')} ({self.width} wide{found}). "
                f"Choose the same CLIP in the model and in {COMMAND} --clip, with another --output."
            )


@dataclass
class RowEmbeddings:
    """Function of rows of a data set that returns the entry ``clip_embedding`` of a batch."""

    table: EmbeddingTable
    table_rows: dict[int, int]  # row of the data set -> row of the table

    def __call__(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return ``clip_embedding`` (n, D) float32 of rows (n,); raise a ``UserError`` if one has none."""
        if missing := set(rows.tolist()) - self.table_rows.keys():
            raise UserError(
                f"{self.table.path}: expected an embedding of image {min(missing)}, got none. Give the data set to "
                f"{COMMAND} and with_embeddings without split and limit."
            )
        table_rows = [self.table_rows[row] for row in rows.tolist()]
        return {"clip_embedding": torch.from_numpy(self.table.values[table_rows])}


def read_original(dataset: ImageDataset, row: int) -> tuple[str, Image.Image | None]:
    """Return a hash of an image as it is stored, and the image; an error message and None if it cannot be read."""
    name = dataset.row_name(row)
    try:
        stored = dataset.original(row)
        is_file = isinstance(stored, bytes)
        picture = decode_picture(stored, name, dataset.decoding) if is_file else Image.fromarray(stored)
    except Exception as error:  # readers of images raise many kinds of errors for damaged files
        return str(error) if isinstance(error, UserError) else f"{name}: {error!r}", None
    return hashlib.sha256(bytes(stored)).hexdigest()[:16], picture


def match_paths(entries: Sequence[str], names: Sequence[str], folder: Path | None) -> np.ndarray:
    """Return the position of each name among the entries of a file, (n,) int64; -1 if there is none.

    Paths are equal if they end in the same path below ``folder``, so that a file remains valid when the folder is
    moved. Where several do, the one with most parent folders in common is taken, and none if two have the same.
    """
    above = "" if folder is None else f"{folder.as_posix()}/"
    wanted = {name.removeprefix(above): position for position, name in enumerate(names)}
    parents = Path(folder or "").absolute().as_posix().split("/")[::-1]
    found, most = np.full(len(names), -1), np.full(len(names), -1)
    for row, entry in enumerate(entries):
        parts = entry.replace("\\", "/").split("/")
        start = next((k for k in range(len(parts)) if "/".join(parts[k:]) in wanted), None)
        if start is None:
            continue
        position = wanted["/".join(parts[start:])]
        common = len(os.path.commonprefix([parts[:start][::-1], parents]))
        if common >= most[position]:
            found[position], most[position] = -1 if common == most[position] else row, common
    return found


def with_embeddings(data: Mapping[str, Any], embeddings: AnyPath) -> ImageDataset:
    """Return a data set whose items also contain ``clip_embedding``, (D,) float32 (batches: (B, D)).

    Images without an embedding are left out if they cannot be read.

    Args:
        data: ``{target, params}`` of any data set of ``ldm.data``.
        embeddings: file of the embeddings, written by ``scripts/preprocess_clip.py``. Rows are found by path (or
            number of the image), in any order; rows of other images are ignored.

    Raises:
        ConfigError: the data set is of another kind.
        UserError: the file is missing or damaged, or lacks images of the data set, or belongs to other images.
    """
    dataset = unwrap(instantiate_from_config(data))
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(
            f"data: expected a data set of ldm.data (ImageFolder, World3D, ...), got {type(dataset).__name__}. Use "
            "ldm.data.formats.folder.ImageFolder for a folder of images, or derive the class from ImageDataset."
        )
    table, rows = read_table(Path(embeddings).expanduser()), np.unique(dataset.rows)
    names = [dataset.row_name(row) for row in rows.tolist()]
    found = match_paths(table.names, names, dataset.path)
    is_known = found >= 0
    for row in rows[~is_known].tolist():
        if read_original(dataset, row)[1] is not None:
            raise UserError(
                f"{table.path}: expected an embedding of each of {len(names)} images, got none (or two of other "
                f"folders) of {sum(~is_known)}, such as {dataset.row_name(row)}. Add them with {COMMAND}, which keeps "
                "finished rows."
            )
    if not is_known.all():
        logger.warning("%s: %d images were left out, because they cannot be read", table.path, sum(~is_known))
    view = copy.copy(dataset)
    view.rows = dataset.rows[np.isin(dataset.rows, rows[is_known])]
    labels = RowEmbeddings(table, dict(zip(rows[is_known].tolist(), found[is_known].tolist())))
    view.more_labels = (*dataset.more_labels, labels)
    _compare_images(dataset, labels)
    return view


def table_of(dataset: Any) -> EmbeddingTable | None:
    """Return the file that the embeddings of a data set come from; None without embeddings."""
    images = unwrap(dataset)
    labels = images.more_labels if isinstance(images, ImageDataset) else ()
    return next((each.table for each in labels if isinstance(each, RowEmbeddings)), None)


def _compare_images(dataset: ImageDataset, labels: RowEmbeddings) -> None:
    """Raise a ``UserError`` if some of the images are not those that the embeddings were computed of."""
    table, pairs = labels.table, list(labels.table_rows.items())
    hashes = table.record.get("hashes", {})
    for row, table_row in pairs[:: len(pairs) // _CHECKED + 1]:
        known = hashes.get(table.names[table_row])
        if known and read_original(dataset, row)[0] != known:
            raise UserError(
                f"{table.path}: expected embeddings of these images, but {dataset.row_name(row)} is not the image that "
                f"was embedded. Remove the file, then compute it again with {COMMAND}."
            )


def check_suffix(path: Path) -> None:
    """Raise a ``UserError`` unless the file has the suffix of a known format."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file of embeddings ({', '.join(SUFFIXES)}). Choose another name.")


def read_table(path: Path, is_partial: bool = False) -> EmbeddingTable:
    """Read a file of embeddings.

    The last line of a .csv may lack the newline. It is a row if it has all numbers (with a warning, since the last one
    may be cut off), else it is ignored; with ``is_partial`` it is always ignored, so that it is computed again.

    Raises:
        UserError: the file is missing, damaged or malformed.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a file of CLIP embeddings, got none. Compute it with {COMMAND}.")
    with readable(path, path.suffix, SafetensorError, KeyError):
        table = _read_csv(path, is_partial) if path.suffix == ".csv" else _read_arrays(path)
    values, names = table.values, table.names
    if values.ndim != 2 or values.dtype != np.float32 or len(values) != len(names):
        raise UserError(
            f"{path}: expected embeddings (n, D) float32 and n paths, got {values.shape} {values.dtype} and "
            f"{len(names)} paths. Compute the file again with {COMMAND}."
        )
    if len(wrong := np.flatnonzero(~np.isfinite(values).all(axis=1))):
        raise UserError(
            f"{path}: expected finite numbers, got others in row {wrong[0] + 1} ({names[wrong[0]]}). Remove the row, "
            f"then rerun {COMMAND}."
        )
    return table


def _read_arrays(path: Path) -> EmbeddingTable:
    if path.suffix == ".safetensors":
        arrays = load_file(path)
    else:
        with h5py.File(path, "r") as file:
            arrays = {key: file[key][:] for key in ("embeddings", "record")}
    record = json.loads(arrays["record"].tobytes())
    return EmbeddingTable(path, list(record["hashes"]), arrays["embeddings"], record)


def _read_csv(path: Path, is_partial: bool) -> EmbeddingTable:
    values: dict[str, np.ndarray] = {}
    width = 0
    with path.open(encoding="utf-8-sig") as file:
        lines = (line := text for text in file if text.endswith("\n") or not is_partial)
        for number, (cell, *cells) in enumerate(filter(None, csv.reader(lines)), start=1):
            name = csv_text(cell)
            if name in values:
                first = list(values).index(name) + 1
                raise UserError(
                    f"{path}: expected one row per image, got two of {name} (rows {first} and {number}). Remove one."
                )
            width = width or max(1, len(cells))
            try:
                values[name] = np.array(cells, np.float32).reshape(width)
                if not line.endswith("\n"):
                    logger.warning("%s: row %d (%s) has no newline: the last number may be cut off", path, number, name)
            except ValueError as error:
                if not line.endswith("\n"):
                    continue
                raise UserError(
                    f"{path}: row {number} ({name}): expected a path and {width} numbers, got {len(cells)} ({error}). "
                    "Correct or remove the row."
                ) from error
    beside = Path(f"{path}.json")
    with readable(beside, "JSON"):
        record = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return EmbeddingTable(path, list(values), np.array([*values.values()], np.float32).reshape(-1, width or 1), record)


def write_table(table: EmbeddingTable) -> None:
    """Write a file of embeddings atomically."""
    path, hashes = table.path, table.record.get("hashes", {})
    record = json.dumps({**table.record, "hashes": {name: hashes.get(name) for name in table.names}})
    arrays = {"embeddings": table.values, "record": np.frombuffer(record.encode(), np.uint8)}
    with explained_writing(path, table.values.nbytes):
        if path.suffix == ".csv":
            with atomic_write(f"{path}.json") as stream:
                stream.write(record)
            with atomic_write(path) as stream:
                rows = ([csv_cell(name), *map(str, value)] for name, value in zip(table.names, table.values))
                csv.writer(stream, lineterminator="\n").writerows(rows)
        elif path.suffix == ".safetensors":
            with atomic_write(path, "wb") as stream:
                stream.write(save(arrays))
        else:
            with atomic_write(path, "w+b") as stream, h5py.File(stream, "w") as file:
                file.update(arrays)
