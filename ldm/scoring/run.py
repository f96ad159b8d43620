"""Score stored representations in parallel: every metric, slow ones factor by factor, each result kept at once.

A representation file becomes a handful of jobs: first its latents are reduced to scalar units, then each metric (DCI:
each factor) is a job of its own for every seed, longest first. Jobs run in processes of this machine or on a Dask
cluster. Nothing here, nor in the workers, imports torch.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.metrics import DEFAULT_PROTOCOL, METRICS, PROTOCOL_SEED, Metric, select_metrics
from ldm.runs.folder import update_results
from ldm.scoring.arrays import IncompleteFile
from ldm.scoring.factors import Factors
from ldm.scoring.files import LatentFile, find_runs, latent_paths, read_latent_file, read_scores, scores_folder
from ldm.scoring.jobs import Place, prepare, score_part
from ldm.scoring.spaces import describe_dataset, space_of
from ldm.scoring.tasks import ScoreTask, Setting
from ldm.scoring.workers import Job, Outcome, Pool, WorkerPool
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

ProgressListener = Callable[[float, float], None]  # (seconds of work done, seconds in all), both estimates
PREPARE = "prepare"  # name of the job that reduces latents to units
PICTURED = ("dci",)  # metrics whose parts a report draws
SETTLE_SECONDS = 60.0  # a damaged file that changed so lately is probably still being written


@dataclass(frozen=True)
class Failure:
    """A representation file that could not be scored, or one of its jobs, and why.

    Attributes:
        path: the file.
        reason: one line.
        is_settled: False for a file that is incomplete but was changed a moment ago: worth another look.
    """

    path: Path
    reason: str
    is_settled: bool = True


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


@dataclass
class FileTasks:
    """What is to be done with one representation file: a task for each seed, on the same reduced latents."""

    latents: LatentFile
    tasks: list[ScoreTask]

    @property
    def seconds(self) -> float:
        """Estimated work in all."""
        return self.tasks[0].prepare_seconds + sum(part.seconds for task in self.tasks for part in task.missing)

    @property
    def longest(self) -> float:
        """Estimate of its longest job."""
        return max((part.seconds for task in self.tasks for part in task.missing), default=0.0)


def score_folder(
    logdir: str | Path,
    num_workers: int,
    dataset: str | None = None,
    seeds: Sequence[int] = (PROTOCOL_SEED,),
    metrics: Mapping[str, Metric] | None = None,
    protocol: str = DEFAULT_PROTOCOL,
    *,
    scheduler: str | None = None,
    for_report: bool = False,
    on_progress: ProgressListener = lambda done, total: None,
    skip: frozenset[tuple[Path, int]] = frozenset(),
) -> Report:
    """Score every representation file at or below ``logdir`` by the metrics that its score file lacks.

    Args:
        logdir: a run folder, or any folder above runs.
        num_workers: processes to keep busy on this machine.
        dataset: name of a factor space for files that do not say theirs.
        seeds: of every metric's random generator; the published protocol uses 0.
        metrics: what to score, by name; None takes the protocol's.
        protocol: name of the protocol the metrics' arguments come from.
        scheduler: address of a Dask scheduler, whose workers do the jobs instead.
        for_report: also compute what a report draws of each run's latest checkpoint.
        on_progress: told the estimated seconds of work done and in all, whenever a job is done.
        skip: ``file_state`` of files to leave out, such as those that failed before.

    Returns:
        The score files written and what failed; a failure never stops the other jobs.

    Raises:
        UserError: no such folder, or no such scheduler.
        ConfigError: unknown protocol.
    """
    metrics = select_metrics(protocol) if metrics is None else metrics
    report = Report(runs=find_runs(logdir))
    files: list[FileTasks] = []
    for run in report.runs:
        paths = [path for path in latent_paths(run) if (path, _modified(path)) not in skip]
        heads = _read_heads(paths, report.failures)
        for step, latents in heads.items():
            pictured = PICTURED if for_report and step == max(heads) else ()
            settings = [Setting(metrics, protocol, seed, seed == seeds[0], pictured) for seed in seeds]
            files += _plan_file(latents, settings, dataset, report.failures)
    run_tasks(files, num_workers, report, scheduler, Path(logdir), on_progress)
    return report


def run_tasks(
    files: Sequence[FileTasks],
    num_workers: int,
    report: Report,
    scheduler: str | None = None,
    shared_folder: Path | None = None,
    on_progress: ProgressListener = lambda done, total: None,
) -> None:
    """Do all jobs of some files; what comes of it goes to ``report``.

    Args:
        files: what is to be done.
        num_workers: processes of this machine.
        report: takes the written files and the failures.
        scheduler: address of a Dask scheduler instead.
        shared_folder: a folder that all workers of the cluster reach; reduced latents are handed over in it.
        on_progress: told the estimated seconds of work done and in all.

    Raises:
        UserError: no such scheduler.
    """
    if not files:
        on_progress(0.0, 0.0)
        return
    where = None if scheduler is None else shared_folder
    scratch_folder = tempfile.TemporaryDirectory(prefix=".scores-", dir=where, ignore_cleanup_errors=True)
    with scratch_folder as scratch, _pool(num_workers, scheduler) as pool:
        _Scorer(files, Path(scratch).resolve(), report, on_progress).run(pool, max(num_workers, pool.num_workers))


def _pool(num_workers: int, scheduler: str | None) -> Pool:
    if scheduler is None:
        return WorkerPool(num_workers)
    from ldm.scoring.cluster import ClusterPool

    return ClusterPool(scheduler)


def file_state(failure: Failure) -> tuple[Path, int]:
    """A failed file and when it was written: worth another attempt only once it has changed."""
    return failure.path, _modified(failure.path)


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def failure_of(path: Path, error: Exception) -> Failure:
    """What to say of a file that cannot be read."""
    age = time.time() - _modified(path) / 1e9
    if isinstance(error, IncompleteFile) and age < SETTLE_SECONDS:
        hint = f" (it changed {max(0.0, age):.0f} s ago: probably it is still being written; --watch waits for it)"
        return Failure(path, f"{error}{hint}", is_settled=False)
    return Failure(path, str(error))


def _read_heads(paths: Iterable[Path], failures: list[Failure]) -> dict[int, LatentFile]:
    """Heads of a run's files by step; of two files of the same step the latter."""
    heads: dict[int, LatentFile] = {}
    for path in paths:
        try:
            latents = read_latent_file(path)
        except (UserError, ConfigError, OSError) as err:
            failures.append(failure_of(path, err))
            continue
        older = heads.get(latents.num_samples)
        if older is not None:
            logger.warning(
                "%s and %s are of the same step %d: scoring the latter", older.path.name, path, latents.num_samples
            )
        heads[latents.num_samples] = latents
    return heads


def _plan_file(
    latents: LatentFile, settings: Sequence[Setting], dataset: str | None, failures: list[Failure]
) -> list[FileTasks]:
    """The tasks of one file that are not done, checked as far as its head tells; otherwise a failure."""
    try:
        targets = [
            scores_folder(latents.run_dir, setting.seed, setting.protocol) / f"{latents.num_samples}.json"
            for setting in settings
        ]
        space = space_of(latents, dataset)
        about = describe_dataset(latents.run_dir, space, dataset)
        tasks = [
            ScoreTask(latents, Factors.of_space(space), about, setting, target)
            for setting, target in zip(settings, targets)
        ]
    except (UserError, ConfigError, OSError) as err:
        failures.append(failure_of(latents.path, err))
        return []
    tasks = [task for task in tasks if not task.is_done]
    return [FileTasks(latents, tasks)] if tasks else []


class _Scorer:
    """Drives all files through one pool of workers, a few at a time so that their reduced latents find room."""

    def __init__(
        self, files: Sequence[FileTasks], scratch: Path, report: Report, on_progress: ProgressListener
    ) -> None:
        # the largest file's longest job decides when all is done, so it comes first
        self._files = sorted(files, key=lambda file: -file.longest)
        self._scratch, self._report, self._on_progress = scratch, report, on_progress
        self._next = 0
        self._open: dict[int, int] = {}  # file number -> jobs that have no outcome yet
        self._done_seconds, self._total_seconds = 0.0, sum(file.seconds for file in self._files)

    def run(self, pool: Pool, width: int) -> None:
        """Score all files, those of ``width`` jobs and one more at a time."""
        self._on_progress(0.0, self._total_seconds)
        for _ in range(width + 1):
            self._start_next(pool)
        for outcome in pool.outcomes():
            self._take(pool, outcome)

    def _start_next(self, pool: Pool) -> None:
        """Begin the next file that has jobs; write those that were interrupted just before their score file."""
        while self._next < len(self._files):
            number, self._next = self._next, self._next + 1
            file = self._files[number]
            if not any(task.missing for task in file.tasks):
                self._finish(file)
                continue
            self._open[number] = 1
            pool.submit(Job((number, 0, PREPARE), prepare, (self._place(number),)), file.longest)
            return

    def _place(self, number: int) -> Place:
        return Place(self._files[number].latents.path.resolve(), self._scratch / str(number))

    def _take(self, pool: Pool, outcome: Outcome) -> None:
        """Keep a result, queue what it makes possible, or note what went wrong."""
        number, task_number, name = outcome.job.key
        file = self._files[number]
        task = file.tasks[task_number]
        self._done_seconds += task.prepare_seconds if name == PREPARE else task.parts[name].seconds
        if outcome.error is not None:
            what = "" if name == PREPARE else f"{name}: "
            self._report.failures.append(Failure(file.latents.path, what + outcome.error))
            if name == PREPARE:
                self._done_seconds += file.seconds - task.prepare_seconds
        elif name == PREPARE:
            self._submit_parts(pool, number)
        else:
            task.add(name, outcome.result)
        self._open[number] -= 1
        if not self._open[number]:
            self._close(pool, number)
        self._on_progress(self._done_seconds, self._total_seconds)

    def _submit_parts(self, pool: Pool, number: int) -> None:
        place = self._place(number)
        for task_number, task in enumerate(self._files[number].tasks):
            for part in task.missing:
                args = (part, place, task.factors, task.setting.seed)
                pool.submit(Job((number, task_number, part.name), score_part, args), part.seconds)
                self._open[number] += 1

    def _close(self, pool: Pool, number: int) -> None:
        """All jobs of a file have an outcome: write what they make, make room, go on."""
        for path in sorted((self._scratch / str(number)).glob("*")):
            path.unlink()
        self._finish(self._files[number])
        self._start_next(pool)

    def _finish(self, file: FileTasks) -> None:
        for task in file.tasks:
            if not task.finish():
                continue
            self._report.written.append(task.target)
            seed = "" if task.setting.seed == PROTOCOL_SEED else f", seed {task.setting.seed}"
            logger.info("%s scored%s", task.label, seed)
            if task.setting.seed == PROTOCOL_SEED and task.setting.protocol == DEFAULT_PROTOCOL and not task.is_own:
                self._publish(file.latents.run_dir, task.target)

    def _publish(self, run_dir: Path, target: Path) -> None:
        try:
            publish_latest(run_dir)
        except UserError as err:
            self._report.failures.append(Failure(target, str(err)))


def figures_of(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figure of each metric that tables show, from a score file's content: ``{"factor_vae": 0.93, ...}``."""
    return {
        name: float(scores[metric.key][metric.figure])
        for name, metric in METRICS.items()
        if isinstance(scores.get(metric.key), Mapping) and metric.figure in scores[metric.key]
    }


def best_of(figures: Mapping[int, Mapping[str, float]]) -> dict[str, tuple[int, float]]:
    """For each figure the step where it is best and its value there; the earliest of equals.

    Args:
        figures: step -> figures.
    """
    best: dict[str, tuple[int, float]] = {}
    for step, found in sorted(figures.items()):
        for name, value in found.items():
            sign = 1.0 if name not in METRICS or METRICS[name].higher_is_better else -1.0
            if name not in best or sign * value > sign * best[name][1]:
                best[name] = (step, value)
    return best


def publish_latest(run_dir: Path) -> None:
    """Put the figures of the run's latest scored checkpoint, and the best of each, into its ``results.json``."""
    figures = {step: figures_of(content) for step, content in read_scores(run_dir, PROTOCOL_SEED).items()}
    if figures:
        best = {name: {"score": value, "step": step} for name, (step, value) in best_of(figures).items()}
        update_results(run_dir, **figures[max(figures)], best_scores=best)
