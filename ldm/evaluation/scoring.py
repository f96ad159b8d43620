"""Score stored representations in parallel: every metric, slow ones factor by factor, each result kept at once.

A representation file becomes a handful of jobs for worker processes: first its latents are reduced to scalar
units, then each metric (DCI: each factor) is a job of its own, longest first over all files. Results wait in
``dis_metrics/.<num_samples>.partial.json`` until the file is complete, so an interrupted command continues where
it stopped. Nothing here, nor in the workers, imports torch.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import FactorSpace
from ldm.evaluation.score_files import (
    LatentFile,
    find_runs,
    latent_paths,
    open_latents,
    read_latent_file,
    read_scores,
    scores_folder,
    write_json,
)
from ldm.evaluation.score_spaces import space_of
from ldm.evaluation.score_workers import Job, Outcome, WorkerPool
from ldm.metrics import METRICS, PROTOCOL_SEED, Metric
from ldm.metrics.representation import scalar_units
from ldm.training.run_folder import update_results
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

ProgressListener = Callable[[float, float], None]  # (seconds of work done, seconds in all), both estimates
PREPARE_VALUES_PER_SECOND = 3e7
PREPARE = "prepare"  # name of the job that reduces latents to units


@dataclass(frozen=True)
class Failure:
    """A representation file that could not be scored, or one of its jobs, and why."""

    path: Path
    reason: str


@dataclass
class Report:
    """What scoring a folder led to.

    Attributes:
        runs: all run folders found.
        written: score files written.
        failures: what could not be scored.
    """

    runs: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A job's share of a score file: a metric, or one factor of a metric that comes in parts."""

    name: str
    function: Callable[..., dict[str, Any]]
    factor: int | None
    protocol: dict[str, Any]
    seconds: float


class ScoreTask:
    """One representation file on its way to a score file.

    Args:
        latents: head of the file.
        space: its factors.
        metrics: the metrics to score, by name.
        seed: of every metric's random generator.
    """

    def __init__(self, latents: LatentFile, space: FactorSpace, metrics: Mapping[str, Metric], seed: int) -> None:
        folder = scores_folder(latents.run_dir, seed)
        self.latents, self.space, self.seed = latents, space, seed
        self.target = folder / f"{latents.num_samples}.json"
        self._metrics = metrics
        self._partial = folder / f".{latents.num_samples}.partial.json"
        self.parts = {part.name: part for name, metric in metrics.items() for part in self._parts_of(name, metric)}
        self._results = self._kept_results()
        self.prepare_seconds = 1.0 + float(np.prod(latents.shape)) / PREPARE_VALUES_PER_SECOND

    @property
    def missing(self) -> list[Part]:
        """Parts without a result."""
        return [part for part in self.parts.values() if part.name not in self._results]

    def add(self, name: str, result: dict[str, Any]) -> bool:
        """Keep a part's result on disk; True if the score file is complete and written."""
        self._results[name] = result
        if self.missing:
            write_json(self._partial, {"made_of": self._identity(), "results": self._results})
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Write the score file from all parts."""
        write_json(self.target, {metric.key: self._joined(name, metric) for name, metric in self._metrics.items()})
        self._partial.unlink(missing_ok=True)

    def _joined(self, name: str, metric: Metric) -> dict[str, Any]:
        if metric.join is None:
            return self._results[name]
        return metric.join([self._results[part.name] for part in self._parts_of(name, metric)])

    def _parts_of(self, name: str, metric: Metric) -> list[Part]:
        units, sizes = self.latents.shape[1], self.space.factors_num_values
        protocol = dict(metric.protocol)
        if metric.part is None:
            return [Part(name, metric.function, None, protocol, metric.seconds(units, max(sizes)))]
        return [
            Part(f"{name}/{factor}", metric.part, factor, protocol, metric.seconds(units, size))
            for factor, size in enumerate(sizes)
        ]

    def _identity(self) -> dict[str, Any]:
        """What results depend on; kept results of anything else are not taken up."""
        status = self.latents.path.stat()
        return {
            "file": [self.latents.path.name, status.st_size, status.st_mtime_ns],
            "factors": list(self.space.factors_num_values),
            "protocols": {name: dict(metric.protocol) for name, metric in self._metrics.items()},
        }

    def _kept_results(self) -> dict[str, dict[str, Any]]:
        if not self._partial.is_file():
            return {}
        try:
            kept = json.loads(self._partial.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("%s is no JSON: its results are computed anew", self._partial)
            return {}
        if kept.get("made_of") != self._identity():
            return {}
        return {name: result for name, result in kept["results"].items() if name in self.parts}


def score_folder(
    logdir: str | Path,
    num_workers: int,
    dataset: str | None = None,
    seed: int = PROTOCOL_SEED,
    metrics: Mapping[str, Metric] = METRICS,
    on_progress: ProgressListener = lambda done, total: None,
    skip: frozenset[tuple[Path, int]] = frozenset(),
) -> Report:
    """Score every representation file at or below ``logdir`` that has no score file yet.

    Args:
        logdir: a run folder, or any folder above runs.
        num_workers: processes to keep busy.
        dataset: name of a factor space for files that do not say theirs.
        seed: of every metric's random generator; the published protocol uses 0.
        metrics: what to score, by name.
        on_progress: told the estimated seconds of work done and in all, whenever a job is done.
        skip: ``file_state`` of files to leave out, such as those that failed before.

    Returns:
        The score files written and what failed; a failure never stops the other jobs.

    Raises:
        UserError: no such folder.
    """
    report = Report(runs=find_runs(logdir))
    tasks = []
    for run in report.runs:
        paths = [path for path in latent_paths(run) if (path, _modified(path)) not in skip]
        tasks += _plan_run(run, paths, dataset, seed, metrics, report.failures)
    with tempfile.TemporaryDirectory(prefix="scores-") as units_folder:
        _Scorer(tasks, Path(units_folder), report, on_progress).run(num_workers)
    return report


def file_state(failure: Failure) -> tuple[Path, int]:
    """A failed file and when it was written: worth another attempt only once it has changed."""
    return failure.path, _modified(failure.path)


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _plan_run(
    run: Path,
    paths: Sequence[Path],
    dataset: str | None,
    seed: int,
    metrics: Mapping[str, Metric],
    failures: list[Failure],
) -> list[ScoreTask]:
    """The run's files that have no score yet, checked as far as their heads tell; the rest goes to ``failures``."""
    tasks: dict[Path, ScoreTask] = {}
    for path in paths:
        try:
            latents = read_latent_file(path)
            if (scores_folder(run, seed) / f"{latents.num_samples}.json").is_file():
                continue
            task = ScoreTask(latents, space_of(latents, dataset), metrics, seed)
        except (UserError, ConfigError) as err:
            failures.append(Failure(path, str(err)))
            continue
        if task.target in tasks:
            older = tasks[task.target].latents.path.name
            logger.warning("%s and %s are of the same step %d: scoring the latter", older, path, latents.num_samples)
        tasks[task.target] = task
    return list(tasks.values())


class _Scorer:
    """Drives all tasks through one pool of workers."""

    def __init__(
        self, tasks: Sequence[ScoreTask], units_folder: Path, report: Report, on_progress: ProgressListener
    ) -> None:
        self._tasks, self._units_folder = tasks, units_folder
        self._report, self._on_progress = report, on_progress
        self._done_seconds = 0.0
        self._total_seconds = sum(t.prepare_seconds + sum(part.seconds for part in t.missing) for t in tasks)

    def run(self, num_workers: int) -> None:
        """Score all tasks."""
        self._on_progress(0.0, self._total_seconds)
        with WorkerPool(num_workers) as pool:
            for number, task in enumerate(self._tasks):
                if task.missing:
                    args = (task.latents.path, self._units_path(number))
                    # the largest file's longest part decides when all is done, so it is prepared first
                    pool.submit(Job((number, PREPARE), _prepare, args), max(part.seconds for part in task.missing))
                else:  # interrupted between its last part and the score file
                    task.finish()
                    self._written(task)
            for outcome in pool.outcomes():
                self._take(pool, outcome)

    def _take(self, pool: WorkerPool, outcome: Outcome) -> None:
        """Keep a result, queue what it makes possible, or note what went wrong."""
        number, name = outcome.job.key
        task = self._tasks[number]
        self._done_seconds += task.prepare_seconds if name == PREPARE else task.parts[name].seconds
        if outcome.error is not None:
            what = "" if name == PREPARE else f"{name}: "
            self._report.failures.append(Failure(task.latents.path, what + outcome.error))
            if name == PREPARE:
                self._done_seconds += sum(part.seconds for part in task.missing)
        elif name == PREPARE:
            for part in task.missing:
                args = (part, self._units_path(number), task.space, task.seed)
                pool.submit(Job((number, part.name), _score_part, args), part.seconds)
        elif task.add(name, outcome.result):
            self._units_path(number).unlink()
            self._written(task)
        self._on_progress(self._done_seconds, self._total_seconds)

    def _written(self, task: ScoreTask) -> None:
        self._report.written.append(task.target)
        logger.info("%s: step %d scored", task.latents.run_dir.name, task.latents.num_samples)
        if task.seed != PROTOCOL_SEED:
            return
        try:
            publish_latest(task.latents.run_dir)
        except UserError as err:
            self._report.failures.append(Failure(task.target, str(err)))

    def _units_path(self, number: int) -> Path:
        return self._units_folder / f"{number}.npy"


def _prepare(latents_path: Path, units_path: Path) -> None:
    """Worker: reduce a file's latents to scalar units (N, U) that other jobs share through the page cache."""
    np.save(units_path, scalar_units(open_latents(latents_path)))


def _score_part(part: Part, units_path: Path, space: FactorSpace, seed: int) -> dict[str, Any]:
    """Worker: one metric, or one factor of it, with a random generator of its own."""
    units = np.load(units_path, mmap_mode="r")
    which = () if part.factor is None else (part.factor,)
    return part.function(units, space, np.random.RandomState(seed), *which, **part.protocol)


def figures_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figure of each metric that tables show, from a score file's content: ``{"factor_vae": 0.93, ...}``."""
    return {
        name: float(scores[metric.key][metric.figure]) for name, metric in METRICS.items() if metric.key in scores
    }


def publish_latest(run_dir: Path) -> None:
    """Put the figures of the run's latest scored checkpoint into its ``results.json``."""
    scores = read_scores(run_dir, PROTOCOL_SEED)
    if scores:
        update_results(run_dir, **figures_of(scores[max(scores)]))
