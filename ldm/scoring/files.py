"""The files of a score: runs, their stored representations, finished scores.

``<run>/dis_repre/epoch=NNNNNN.npz`` holds a checkpoint's representation of the whole data set, and
``<run>/dis_metrics/<num_samples>.json`` its scores, where num_samples is the checkpoint's global step. Scores by other
seeds and protocols stand beside them: ``dis_metrics/seed=3/``, ``dis_metrics/protocol=disentanglement_lib/``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED
from ldm.metrics.representation import MOST_UNITS
from ldm.scoring.arrays import array_source, repairable
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

LATENTS_FOLDER = "dis_repre"
SCORES_FOLDER = "dis_metrics"
MED_FOLDER = "dis_metrics_med_wopca"  # where DisDiff's own MED scores lie
_RUN_MARKS = (LATENTS_FOLDER, SCORES_FOLDER, "checkpoints", "run.json")
_NOT_RUNS = (LATENTS_FOLDER, SCORES_FOLDER, MED_FOLDER, "checkpoints", "configs", "images", "testtube")


@dataclass(frozen=True)
class LatentFile:
    """What the head of a representation file says.

    Attributes:
        path: the file.
        shape: (N, U, D) or (N, U) of its latents.
        num_samples: global step of the checkpoint; names the score file.
        factor_names: names of the factors of its data set, if stored.
        factor_sizes: number of values of each, if stored.
        space: the whole factor space, factors that are not to be recovered included, if stored.
        unit_names: what the units stand for, if stored.
    """

    path: Path
    shape: tuple[int, ...]
    num_samples: int
    factor_names: tuple[str, ...] | None = None
    factor_sizes: tuple[int, ...] | None = None
    space: FactorSpace | None = None
    unit_names: tuple[str, ...] | None = None

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
        IncompleteFile: the file is damaged or incomplete.
        UserError: it holds no ``latents`` or ``num_samples``, or latents of a shape that cannot be scored.
    """
    with repairable(path), np.load(path, allow_pickle=False) as content:
        missing = [name for name in ("latents", "num_samples") if name not in content]
        if missing:
            found = ", ".join(content.files) or "nothing"
            raise UserError(
                f"{path} holds {found}; expected latents and num_samples, as a run's test stage writes "
                "them (any other array: --latents FILE)"
            )
        names = _texts(content, "factor_names")
        sizes = tuple(int(size) for size in content["factor_sizes"]) if "factor_sizes" in content else None
        stored = json.loads(str(content["factor_space"])) if "factor_space" in content else None
        space = FactorSpace.from_dict(stored) if stored else None
        step, units = int(content["num_samples"].item()), _texts(content, "unit_names")
    return LatentFile(path, latent_shape(path), step, names, sizes, space, units)


def _texts(content: Mapping[str, np.ndarray], name: str) -> tuple[str, ...] | None:
    return tuple(str(text) for text in content[name]) if name in content else None


def latent_shape(path: Path) -> tuple[int, ...]:
    """Shape (N, U, D) or (N, U) of the latents in a file.

    Raises:
        IncompleteFile: the file is damaged or incomplete.
        UserError: it holds no numbers, an array of another number of axes, no rows, or far too many units.
    """
    source = array_source(path)
    if len(source.shape) not in (2, 3) or 0 in source.shape:
        raise UserError(
            f"{path}: latents have shape {source.shape}; expected (images, units) or (images, units, width), not empty"
        )
    if source.shape[1] > MOST_UNITS:
        raise UserError(
            f"{path}: latents have shape {source.shape}, which makes {source.shape[1]:,} units per image; expected at "
            f"most {MOST_UNITS:,}. Are these pictures, or are the axes exchanged? Expected (images, units)"
        )
    return source.shape


def scores_folder(run_dir: Path, seed: int, protocol: str = DEFAULT_PROTOCOL) -> Path:
    """Where a run's scores live; those by DisDiff's protocol and its own seed 0 in the place everybody expects."""
    if protocol == "med":
        folder = run_dir / MED_FOLDER
    else:
        folder = run_dir / SCORES_FOLDER
        folder = folder if protocol == DEFAULT_PROTOCOL else folder / f"protocol={protocol}"
    return folder if seed == PROTOCOL_SEED else folder / f"seed={seed}"


def read_scores(run_dir: Path, seed: int, protocol: str = DEFAULT_PROTOCOL) -> dict[int, dict[str, dict[str, float]]]:
    """All finished scores of a run: ``{num_samples: {JSON key: result}}``, in order of num_samples."""
    scores = {}
    for path in scores_folder(run_dir, seed, protocol).glob("*.json"):
        if not path.stem.isdigit():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as err:
            logger.warning("%s is no JSON (%s): left out; score that checkpoint again", path, err)
            continue
        if isinstance(content, dict):
            scores[int(path.stem)] = content
    return dict(sorted(scores.items()))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write in one step, so that a reader never sees half a file."""
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=1, default=float)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``"0"``, ``"0-9"`` or ``"0-4,7"``, each once.

    Raises:
        UserError: anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first or last - first >= 1000:
            raise UserError(f"--seeds {text}: expected whole numbers and rising ranges, such as 0, 0-9 or 0-4,7")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))
