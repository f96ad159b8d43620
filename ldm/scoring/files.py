"""Files of a run that scoring reads and writes: representations, score files, records.

``<run>/dis_repre/epoch=NNNNNN.npz`` holds the representation of the whole data set at one checkpoint, and
``<run>/dis_metrics/<num_samples>.json`` its scores, where num_samples is the global step of the checkpoint. Scores with
other seeds and protocols are stored in subfolders: ``dis_metrics/seed=3/``, ``dis_metrics/protocol=fast/``. The record
``dis_metrics/records/<num_samples>.json`` holds the result, protocol, data set, seed and versions of each task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.errors import report_once
from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED, MetricError
from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.representation import check_latents
from ldm.runs.records import read_json, update_results
from ldm.scoring.arrays import array_source, incomplete_if_unreadable
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

LATENTS_FOLDER = "dis_repre"
SCORES_FOLDER = "dis_metrics"
MED_FOLDER = "dis_metrics_med_wopca"  # DisDiff's folder of MED scores
RECORDS_FOLDER = "records"
STANDARDIZED = "standardized"  # subfolder of the scores of standardized units
TRUST_FOLDER = "trust"
SEEDS_KEY, DEVIATION_KEY = "seeds", "deviation"  # keys of a score file that holds several seeds
_RUN_MARKS = (LATENTS_FOLDER, SCORES_FOLDER, "checkpoints", "run.json")
_NOT_RUNS = (LATENTS_FOLDER, SCORES_FOLDER, MED_FOLDER, "checkpoints", "configs", "images", "testtube")


@dataclass(frozen=True)
class LatentFile:
    """Header of a representation file; entries that the file does not store are None."""

    path: Path
    shape: tuple[int, ...]  # (N, U, D) or (N, U)
    num_samples: int  # global step of the checkpoint; the name of the score file
    factor_names: tuple[str, ...] | None = None
    factor_sizes: tuple[int, ...] | None = None  # number of values of each factor
    space: FactorSpace | None = None  # the whole factor space, factors that are not recovered included
    unit_names: tuple[str, ...] | None = None

    @property
    def run_dir(self) -> Path:
        """Folder of the run that encoded it."""
        return self.path.parent.parent

    @property
    def epoch(self) -> int | None:
        """Epoch in the file's name ``epoch=NNNNNN.npz``."""
        found = re.search(r"epoch=(\d+)", self.path.stem)
        return int(found.group(1)) if found else None

    @functools.cached_property
    def checksum(self) -> str:
        """Checksum of the file, computed when it is needed; "removed" if there is no file any more."""
        return checksum(self.path) if self.path.is_file() else "removed"


def checksum(path: Path) -> str:
    """Return the BLAKE2 checksum of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, which may not exist yet."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def find_runs(logdir: str | os.PathLike) -> list[Path]:
    """Return all run folders at or below ``logdir``, sorted by path.

    Raises:
        UserError: the folder does not exist.
    """
    root = Path(logdir)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Pass a run folder, or a folder that contains runs, with -l.")
    runs: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        if any(mark in subfolders or mark in files for mark in _RUN_MARKS):
            runs.append(Path(folder))
        subfolders[:] = [name for name in subfolders if name not in _NOT_RUNS and not name.startswith(".")]
    return sorted(runs)


def latent_paths(run_dir: Path) -> list[Path]:
    """Return the representation files of a run in order of epoch, without hidden files that are being written."""
    return sorted(path for path in (run_dir / LATENTS_FOLDER).glob("*.npz") if not path.name.startswith("."))


def read_latent_file(path: Path, is_any: bool = False) -> LatentFile:
    """Read the header of a representation file; its latents are not loaded.

    Args:
        path: the file.
        is_any: whether files of other programs, without the step of a checkpoint, are accepted.

    Raises:
        IncompleteFile: the file is damaged or incomplete.
        UserError: it does not hold ``latents`` and ``num_samples``, or its latents or factor space are invalid.
    """
    if is_any and path.suffix.lower() != ".npz":
        return LatentFile(path, latent_shape(path), 0)
    with incomplete_if_unreadable(path), np.load(path, allow_pickle=False) as content:
        if "latents" not in content or "num_samples" not in content:
            if is_any:
                return LatentFile(path, latent_shape(path), 0)
            raise UserError(
                f"{path}: expected latents and num_samples, as written by the test stage of a run, got "
                f"{', '.join(content.files) or 'an empty file'}. Score other arrays with --latents FILE."
            )
        names = _texts(content, "factor_names")
        sizes = tuple(int(size) for size in content["factor_sizes"]) if "factor_sizes" in content else None
        stored = json.loads(str(content["factor_space"])) if "factor_space" in content else None
        step, units = int(content["num_samples"].item()), _texts(content, "unit_names")
    try:
        space = FactorSpace.from_dict(stored) if stored else None
    except ConfigError as error:
        raise UserError(f"{path}: {error} Encode that checkpoint again.") from error
    return LatentFile(path, latent_shape(path), step, names, sizes, space, units)


def _texts(content: Mapping[str, np.ndarray], name: str) -> tuple[str, ...] | None:
    return tuple(str(text) for text in content[name]) if name in content else None


def latent_shape(path: Path) -> tuple[int, ...]:
    """Return the shape (N, U, D) or (N, U) of the latents in a file.

    Raises:
        IncompleteFile: the file is damaged or incomplete.
        UserError: it does not hold numbers, or the array is empty, has another number of axes or too many units.
    """
    shape = array_source(path).shape
    try:
        check_latents(shape, shape[0] if shape else 0)
    except MetricError as error:
        raise UserError(f"{path}: {error}") from error
    return shape


def scores_folder(run_dir: Path, seed: int, protocol: str = DEFAULT_PROTOCOL, standardized: bool = False) -> Path:
    """Return the folder of a run's scores; DisDiff's protocol with seed 0 uses ``dis_metrics`` itself.

    Scores of standardized units are stored in a folder of their own.
    """
    if protocol == "med":
        folder = run_dir / MED_FOLDER
    else:
        folder = run_dir / SCORES_FOLDER
        folder = folder if protocol == DEFAULT_PROTOCOL else folder / f"protocol={protocol}"
    folder = folder / STANDARDIZED if standardized else folder
    return folder if seed == PROTOCOL_SEED else folder / f"seed={seed}"


def score_file(
    run_dir: Path, step: int, seed: int, protocol: str = DEFAULT_PROTOCOL, standardized: bool = False
) -> Path:
    """Return the score file of a checkpoint."""
    return scores_folder(run_dir, seed, protocol, standardized) / f"{step}.json"


def trust_folder(target: Path) -> Path:
    """Return the folder of the replicates and variants of a score file; their summary is ``<folder>.json``."""
    return target.parent / TRUST_FOLDER / target.stem


def read_scores(
    run_dir: Path, seed: int, protocol: str = DEFAULT_PROTOCOL, standardized: bool = False
) -> dict[int, dict[str, dict[str, float]]]:
    """Return all score files of a run, ``{num_samples: {JSON key: result}}``, in order of num_samples."""
    folder = scores_folder(run_dir, seed, protocol, standardized)
    paths = [path for path in folder.glob("*.json") if path.stem.isdigit()]
    scores = {int(path.stem): read_score_file(path) for path in paths}
    return {step: content for step, content in sorted(scores.items()) if content}


def read_score_file(path: Path) -> dict[str, Any]:
    """Return the content of a score file without results whose figure is not a number, each with a warning."""
    scores = read_mapping(path)
    for metric in ALL_METRICS.values():
        result = scores.get(metric.key)
        if result is not None and not _is_result(result, metric.figure):
            where, advice = f"{path}: {metric.key}.{metric.figure}", "Delete the file and score that checkpoint again"
            value = result.get(metric.figure) if isinstance(result, Mapping) else result
            report_once(f"{where}: expected a number, got {value!r}. {advice}")
            scores = {key: found for key, found in scores.items() if key != metric.key}
    return scores


def _is_result(result: Any, figure: str) -> bool:
    value = result.get(figure) if isinstance(result, Mapping) else ""
    return isinstance(value, (int, float, type(None))) and not isinstance(value, bool)


def figures_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the figure of each metric in the content of a score file: ``{"factor_vae": 0.93, ...}``."""
    figures = {}
    for name, metric in ALL_METRICS.items():
        result = scores.get(metric.key)
        if _is_result(result, metric.figure) and result.get(metric.figure) is not None:
            figures[name] = float(result[metric.figure])
    return figures


def over_seeds(found: Sequence[Mapping[str, Any] | None]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean of each figure, and its sample standard deviation if there are at least two values.

    Args:
        found: figures of each seed or run; entries that are not numbers (null, lists) are left out, and seeds
            without figures (null).
    """
    values: dict[str, list[float]] = {}
    results = [figures for figures in found if isinstance(figures, Mapping)]
    for name, value in ((name, value) for figures in results for name, value in figures.items()):
        if isinstance(value, (int, float)):
            values.setdefault(name, []).append(value)
    deviations = {name: statistics.stdev(numbers) for name, numbers in values.items() if len(numbers) > 1}
    return {name: statistics.fmean(numbers) for name, numbers in values.items()}, deviations


def best_of(figures: Mapping[int, Mapping[str, float]]) -> dict[str, tuple[int, float]]:
    """Return for each figure the earliest step with its best value, and that value.

    Args:
        figures: step -> figures.
    """
    best: dict[str, tuple[int, float]] = {}
    for step, found in sorted(figures.items()):
        for name, value in found.items():
            sign = 1.0 if ALL_METRICS[name].higher_is_better else -1.0
            if name not in best or sign * value > sign * best[name][1]:
                best[name] = (step, value)
    return best


def publish_latest(run_dir: Path) -> None:
    """Write the figures of a run's latest scored checkpoint, and the best of each, to its ``results.json``."""
    figures = {step: figures_of(content) for step, content in read_scores(run_dir, PROTOCOL_SEED).items()}
    if figures:
        best = {name: {"score": value, "step": step} for name, (step, value) in best_of(figures).items()}
        update_results(run_dir, **figures[max(figures)], best_scores=best)


def record_file(target: Path) -> Path:
    """Return the record that belongs to a score file."""
    return target.parent / RECORDS_FOLDER / f"{target.stem}.json"


def read_record(record: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks in a record, ``{task: {"result", "seed", "protocol", "dataset", ...}}``; empty if none."""
    tasks = read_mapping(record).get("parts", {}) if record.is_file() else {}
    return tasks if isinstance(tasks, dict) else {}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; log a warning and return an empty one if the file does not hold a mapping."""
    try:
        return read_json(path)
    except UserError as error:
        logger.warning("%s. Score that checkpoint again.", error)
        return {}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds such as ``"0"``, ``"0-9"`` or ``"0-4,7"``; each seed is returned once.

    Raises:
        UserError: the text has another form.
    """
    seeds: list[int] = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first or last - first >= 1000:
            raise UserError(f"--seeds: expected numbers and ascending ranges such as 0, 0-9 or 0-4,7, got {text!r}")
        seeds += range(first, last + 1)
    return tuple(dict.fromkeys(seeds))
