"""The files of a score: runs, their stored representations, finished and half-finished scores.

``<run>/dis_repre/epoch=NNNNNN.npz`` holds a checkpoint's representation of the whole data set, and
``<run>/dis_metrics/<num_samples>.json`` its scores, where num_samples is the checkpoint's global step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

LATENTS_FOLDER = "dis_repre"
SCORES_FOLDER = "dis_metrics"
_RUN_MARKS = (LATENTS_FOLDER, SCORES_FOLDER, "checkpoints", "run.json")
_NOT_RUNS = (LATENTS_FOLDER, SCORES_FOLDER, "checkpoints", "configs", "images", "testtube")


@dataclass(frozen=True)
class LatentFile:
    """What the head of a representation file says.

    Attributes:
        path: the file.
        shape: (N, U, D) or (N, U) of its latents.
        num_samples: global step of the checkpoint; names the score file.
        factor_names: names of the factors of its data set, if stored.
        factor_sizes: number of values of each, if stored.
    """

    path: Path
    shape: tuple[int, ...]
    num_samples: int
    factor_names: tuple[str, ...] | None
    factor_sizes: tuple[int, ...] | None

    @property
    def run_dir(self) -> Path:
        """The run that encoded it."""
        return self.path.parent.parent

    @property
    def epoch(self) -> int | None:
        """Epoch in the file's name ``epoch=NNNNNN.npz``."""
        found = re.search(r"epoch=(\d+)", self.path.stem)
        return int(found.group(1)) if found else None


def find_runs(logdir: str | os.PathLike) -> list[Path]:
    """All run folders at or below ``logdir``, sorted by path.

    Raises:
        UserError: no such folder.
    """
    root = Path(logdir)
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the folder of a run, or one with runs in it, with -l")
    runs: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        if any(mark in subfolders or mark in files for mark in _RUN_MARKS):
            runs.append(Path(folder))
        subfolders[:] = [name for name in subfolders if name not in _NOT_RUNS and not name.startswith(".")]
    return sorted(runs)


def latent_paths(run_dir: Path) -> list[Path]:
    """The representation files of a run in order of epoch; files still being written (hidden, .tmp) are not meant."""
    return sorted(path for path in (run_dir / LATENTS_FOLDER).glob("*.npz") if not path.name.startswith("."))


def read_latent_file(path: Path) -> LatentFile:
    """Read the head of a representation file, whatever its size.

    Raises:
        UserError: the file is damaged or incomplete, or holds no ``latents`` or ``num_samples``.
    """
    with _repairable(path), zipfile.ZipFile(path) as archive:
        with archive.open(_member(archive, path, "latents")) as stream:
            shape, _, dtype = _array_header(stream)
        _member(archive, path, "num_samples")
    if len(shape) not in (2, 3) or dtype.kind not in "fiu":
        raise UserError(
            f"{path}: latents have shape {shape} and type {dtype}; expected numbers of shape (images, units) or "
            "(images, units, width)"
        )
    with _repairable(path), np.load(path, allow_pickle=False) as content:
        names = tuple(str(name) for name in content["factor_names"]) if "factor_names" in content else None
        sizes = tuple(int(size) for size in content["factor_sizes"]) if "factor_sizes" in content else None
        return LatentFile(path, shape, int(content["num_samples"].item()), names, sizes)


def open_latents(path: Path) -> np.ndarray:
    """The latents of a file whose checksums hold: memory-mapped where stored plainly, read where compressed.

    Raises:
        UserError: the file is damaged.
    """
    with _repairable(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged} is wrong")
        info = _member(archive, path, "latents")
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        with archive.open(info) as stream:
            shape, fortran_order, dtype = _array_header(stream)
            header_bytes = stream.tell()
    with path.open("rb") as raw:  # the local file header of the zip format: 30 bytes, name, extra field
        raw.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", raw.read(4))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> zipfile.ZipInfo:
    if f"{name}.npy" not in archive.namelist():
        found = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()) or "nothing"
        raise UserError(f"{path} holds {found}; expected latents and num_samples, as a run's test stage writes them")
    return archive.getinfo(f"{name}.npy")


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an array in .npy format; leaves the stream at its first value."""
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


@contextmanager
def _repairable(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one message."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError) as err:
        raise UserError(
            f"{path} is damaged or not complete ({' '.join(str(err).split())}); if nothing is writing it any more, "
            "delete it and encode that checkpoint again"
        ) from err


def scores_folder(run_dir: Path, seed: int) -> Path:
    """Where a run's scores live; those of the protocol's own seed 0 in the place everybody expects."""
    folder = run_dir / SCORES_FOLDER
    return folder if seed == 0 else folder / f"seed={seed}"


def read_scores(run_dir: Path, seed: int) -> dict[int, dict[str, dict[str, float]]]:
    """All finished scores of a run: ``{num_samples: {JSON key: result}}``, in order of num_samples."""
    scores = {}
    for path in scores_folder(run_dir, seed).glob("*.json"):
        if not path.stem.isdigit():
            continue
        try:
            scores[int(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            logger.warning("%s is no JSON (%s): left out; delete it to score that checkpoint again", path, err)
    return dict(sorted(scores.items()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one step, so that a reader never sees half a file."""
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1, default=float)
