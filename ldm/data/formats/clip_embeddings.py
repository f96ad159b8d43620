"""CLIP image embeddings in a file, and data sets whose items contain them.

The format follows from the suffix:

* .safetensors and .h5: ``embeddings`` (n, D) float32, ``paths``, ``hashes`` (n,) uint64 of the images, and a record;
* .csv: no header, one row per image (path, f1, ..., fD); hashes and record are in ``<name>.csv.json``.

The record contains ``clip`` (its name), ``fingerprint`` (``clip_fingerprint``) and ``skipped`` (unreadable images).
A .csv of another program has neither; then only paths and widths are checked.

Legend: n rows, D width of an embedding.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ldm.data.dataset import ImageDataset
from ldm.data.formats.image_sources import H5_SUFFIXES
from ldm.data.paths import AnyPath
from ldm.data.rows import readable
from ldm.data.traits import unwrap
from ldm.util import ConfigError, UserError, atomic_write, instantiate_from_config

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".safetensors", *H5_SUFFIXES)
COMMAND = "python scripts/preprocess_clip.py"
_CHECKED = 32  # images of a data set that are compared with their hashes


@dataclass
class EmbeddingTable:
    """Content of a file of embeddings.

    Attributes:
        path: the file.
        names: n names of images, see ``ImageDataset.row_names``.
        values: (n, D) float32.
        hashes: (n,) uint64, ``content_hash`` of each image; 0 if it is not known.
        record: see the module docstring; empty for a .csv of another program.
    """

    path: Path
    names: list[str]
    values: np.ndarray
    hashes: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """D."""
        return self.values.shape[1]

    def require_clip(self, name: str, fingerprint: str, width: int) -> None:
        """Raise a ``UserError`` unless the embeddings are those of a CLIP; without a record, compare the width."""
        known = self.record.get("fingerprint")
        if known not in (None, fingerprint) or width != self.width:
            raise UserError(
                f"{self.path}: expected embeddings of the CLIP {name} ({width} wide, fingerprint {fingerprint}), got "
                f"those of {self.record.get('clip', 'an unknown CLIP')} ({self.width} wide, fingerprint {known}). "
                f"Choose the same CLIP in the model and in {COMMAND} --clip, with another --output."
            )


class RowEmbeddings:
    """Function of rows of a data set that returns the entry ``clip_embedding`` of a batch.

    Args:
        table: the file.
        shown: (n,) rows of the whole set that have an embedding, ascending.
        places: (n,) row of each in the file.
    """

    def __init__(self, table: EmbeddingTable, shown: np.ndarray, places: np.ndarray) -> None:
        self.table, self._shown, self._places = table, shown, places

    def __call__(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return ``clip_embedding`` (n, D) float32 of rows (n,); raise a ``UserError`` if one has none."""
        positions = self._shown.searchsorted(rows).clip(max=len(self._shown) - 1)
        if (is_missing := self._shown[positions] != rows).any():
            raise UserError(f"{self.table.path}: expected an embedding of image {rows[is_missing][0]}, got none.")
        return {"clip_embedding": torch.from_numpy(self.table.values[self._places[positions]])}


def content_hash(image: bytes | np.ndarray) -> int:
    """Return a hash of an image as it is stored, in [1, 2^64)."""
    shape = b"" if isinstance(image, bytes) else repr(image.shape).encode()
    return int.from_bytes(hashlib.sha256(shape + bytes(image)).digest()[:8], "little") or 1


def match_paths(entries: Sequence[str], names: Sequence[str], folder: Path | None, source: str) -> np.ndarray:
    """Return the position of each name among the entries of a file, (n,) int64; -1 if there is none.

    Paths are equal if they end in the same path below ``folder``, so that a file remains valid when the folder is
    moved. Where several do, the one with most parent folders in common is taken.

    Raises:
        UserError: a name has two entries.
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
        if common == most[position]:
            raise UserError(
                f"{source}: expected one row per image, got two of {entry} (rows {found[position] + 1} and {row + 1}). "
                "Remove one of them."
            )
        if common > most[position]:
            found[position], most[position] = row, common
    return found


def with_embeddings(data: Mapping[str, Any], embeddings: AnyPath) -> ImageDataset:
    """Return a data set whose items also contain ``clip_embedding``, (D,) float32 (batches: (B, D)).

    Images that could not be read when the embeddings were computed are left out.

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
    table = read_table(Path(embeddings).expanduser())
    shown = np.unique(dataset.rows)
    names = dataset.row_names(shown)
    found = match_paths(table.names, names, dataset.path, str(table.path))
    is_missing = found < 0
    skipped = match_paths(table.record.get("skipped", ()), names, dataset.path, str(table.path))
    is_skipped = is_missing & (skipped >= 0)
    missing = np.flatnonzero(is_missing & ~is_skipped)
    if len(missing):
        raise UserError(
            f"{table.path}: expected an embedding of each of {len(names)} images, got none of {len(missing)}, such as "
            f"{names[missing[0]]}. Add them with {COMMAND}, which keeps finished rows."
        )
    view = copy.copy(dataset)
    if is_skipped.any():
        logger.warning("%s: %d images were left out, because they could not be read", table.path, is_skipped.sum())
        view.rows = dataset.rows[~np.isin(dataset.rows, shown[is_skipped])]
        shown, found = shown[~is_skipped], found[~is_skipped]
    _compare_images(dataset, shown, table, found)
    view.more_labels = RowEmbeddings(table, shown, found)
    return view


def table_of(dataset: Any) -> EmbeddingTable | None:
    """Return the file that the embeddings of a data set come from; None without embeddings."""
    images = unwrap(dataset)
    labels = images.more_labels if isinstance(images, ImageDataset) else None
    return labels.table if isinstance(labels, RowEmbeddings) else None


def _compare_images(dataset: ImageDataset, rows: np.ndarray, table: EmbeddingTable, found: np.ndarray) -> None:
    """Raise a ``UserError`` if some of the images are not those that the embeddings were computed of."""
    sample = np.unique(np.linspace(0, len(rows) - 1, min(_CHECKED, len(rows))).astype(int))
    for row, place in zip(rows[sample].tolist(), found[sample]):
        known = int(table.hashes[place])
        if known and content_hash(dataset.original(row)) != known:
            raise UserError(
                f"{table.path}: expected embeddings of these images, but {dataset.row_names(np.array([row]))[0]} is "
                f"not the image that was embedded. Remove the file, then compute it again with {COMMAND}."
            )


def check_suffix(path: Path) -> None:
    """Raise a ``UserError`` unless the file has the suffix of a known format."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file of embeddings ({', '.join(SUFFIXES)}). Choose another name.")


def read_table(path: Path, is_partial: bool = False) -> EmbeddingTable:
    """Read a file of embeddings.

    Args:
        path: the file.
        is_partial: drop an incomplete last line of a .csv, as left by a killed program.

    Raises:
        UserError: the file is missing, damaged, empty or malformed.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a file of CLIP embeddings, got none. Compute it with {COMMAND}.")
    with readable(path, path.suffix, SafetensorError, KeyError):
        if path.suffix == ".csv":
            table = _read_csv(path, is_partial)
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                arrays = {key: file.get_tensor(key) for key in ("embeddings", "paths", "hashes")}
                record = json.loads((file.metadata() or {}).get("record", "{}"))
            names = arrays["paths"].tobytes().decode().split("\0")
            table = EmbeddingTable(path, names, arrays["embeddings"], arrays["hashes"], record)
        else:
            with h5py.File(path, "r") as file:
                names, record = list(file["paths"].asstr()[:]), json.loads(file.attrs.get("record", "{}"))
                table = EmbeddingTable(path, names, file["embeddings"][:], file["hashes"][:], record)
    values, count = table.values, len(table.names)
    if values.ndim != 2 or values.dtype != np.float32 or not len(values) == len(table.hashes) == count:
        raise UserError(
            f"{path}: expected embeddings (n, D) float32 and n paths and hashes, got {values.shape} {values.dtype}, "
            f"{count} paths and {len(table.hashes)} hashes. Compute the file again with {COMMAND}."
        )
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        raise UserError(
            f"{path}: expected finite numbers, got others in row {wrong[0] + 1} ({table.names[wrong[0]]}). Remove the "
            f"row, then rerun {COMMAND}."
        )
    return table


def _read_csv(path: Path, is_partial: bool) -> EmbeddingTable:
    text = path.read_text(encoding="utf-8-sig")
    if is_partial and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
    names, values = [], []
    for number, (name, *cells) in enumerate(filter(None, csv.reader(io.StringIO(text))), start=1):
        try:
            values.append(np.array(cells, dtype=np.float32))
        except ValueError as error:
            raise UserError(f"{path}: row {number}: expected a path and numbers ({error}). Correct the row.") from error
        if not cells or len(cells) != len(values[0]):
            raise UserError(
                f"{path}: row {number} ({name}): expected a path and {len(values[0]) or 'several'} numbers, got "
                f"{len(cells)}. If the program was interrupted, rerun it; else correct the row."
            )
        names.append(name)
    if not names and not is_partial:
        raise UserError(f"{path}: expected rows of a path and numbers, got none. Compute the file with {COMMAND}.")
    beside = _beside(path)
    stored = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    known = stored.get("hashes", {})
    hashes = np.array([int(known.get(name, "0"), 16) for name in names], dtype=np.uint64)
    stacked = np.stack(values) if values else np.zeros((0, 1), np.float32)
    return EmbeddingTable(path, names, stacked, hashes, stored.get("record", {}))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def write_table(table: EmbeddingTable) -> None:
    """Write a file of embeddings atomically."""
    path, record = table.path, json.dumps(table.record)
    if path.suffix == ".csv":
        hashes = {name: f"{number:x}" for name, number in zip(table.names, table.hashes.tolist())}
        with atomic_write(_beside(path)) as stream:
            json.dump({"record": table.record, "hashes": hashes}, stream)
        with atomic_write(path, "wb") as stream:
            text = io.TextIOWrapper(stream, "utf-8", newline="")
            rows = csv.writer(text, lineterminator="\n")
            rows.writerows([name, *map(str, value)] for name, value in zip(table.names, table.values))
            text.detach()
        return
    with atomic_write(path, "w+b") as stream:
        if path.suffix == ".safetensors":
            paths = np.frombuffer("\0".join(table.names).encode(), np.uint8)
            arrays = {"embeddings": table.values, "paths": paths, "hashes": table.hashes}
            stream.write(save(arrays, metadata={"record": record}))
        else:
            with h5py.File(stream, "w") as file:
                file["embeddings"], file["hashes"] = table.values, table.hashes
                file.create_dataset("paths", data=np.array(table.names, dtype=object), dtype=h5py.string_dtype())
                file.attrs["record"] = record


@dataclass
class Journal:
    """Finished embeddings, and the file that each new batch is appended to, readable after a kill at any time.

    Args:
        path: the file.
        rows: hash and embedding by name of the image.
    """

    path: Path
    rows: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)

    def read(self, record: Mapping[str, Any]) -> None:
        """Read the finished batches, and cut off an incomplete one; start a new file if there is none."""
        with self.path.open("a+b") as stream:
            stream.seek(0)
            end = 0
            try:
                known = json.loads(str(np.load(stream)))
                if known != record:
                    raise UserError(
                        f"{self.path}: expected unfinished embeddings of the CLIP {record['clip']} (fingerprint "
                        f"{record['fingerprint']}), got those of {known['clip']} ({known['fingerprint']}). Remove the "
                        "file, or choose another --output."
                    )
                while True:
                    end = stream.tell()
                    names, hashes, values = (np.load(stream) for _ in range(3))
                    self.rows.update(zip(names.tolist(), zip(hashes.tolist(), values)))
            except (EOFError, ValueError):  # the end, or an array that was not written completely
                stream.truncate(end)
            if not end:
                np.save(stream, np.array(json.dumps(record)))

    def add(self, names: Sequence[str], hashes: Sequence[int], values: np.ndarray) -> None:
        """Append a batch."""
        self.rows.update(zip(names, zip(hashes, values)))
        with self.path.open("ab") as stream:
            for array in (np.array(names), np.array(hashes, np.uint64), values):
                np.save(stream, array)
