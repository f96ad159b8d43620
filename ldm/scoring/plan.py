"""Plan of what is to be computed: score files, the tasks each of them lacks, and the results that were kept.

A metric is one task, or one task per factor. Each finished task is stored at once as ``records/<step>/<task>.json``
with the protocol, data set, versions and seed of its result. When no task of a score file is left, these files become
one record, ``records/<step>.json``, beside the score file ``<step>.json``, which holds the results alone. A command
that is stopped at any time therefore loses only unfinished tasks, and no task is computed twice.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.factors import factor_space
from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED, Metric, MetricError
from ldm.metrics.mig import information
from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.representation import check_latents
from ldm.metrics.trust import REMOVED, REPLICATE, VARIANTS
from ldm.runs.records import REASON, plain, write_json
from ldm.scoring import files
from ldm.scoring.arrays import IncompleteFile
from ldm.scoring.engine import Task
from ldm.scoring.factors import Bins, Factors, describe_dataset, factors_from_table, space_of
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

INFORMATION = Metric("information", information, "", seconds=lambda units, values: 0.2)  # for reports; not a score
PICTURED = ("dci",)  # metrics whose tasks a report draws
PREPARE_VALUES_PER_SECOND = 3e7
SETTLE_SECONDS = 60.0  # a damaged file that changed more recently is probably still being written


@dataclass(frozen=True)
class Failure:
    """A representation file, or one of its tasks, that could not be scored, with a message of one line."""

    path: Path
    reason: str
    is_settled: bool = True  # False for an incomplete file that changed recently, which may still be completed

    def __str__(self) -> str:
        return self.reason if str(self.path) in self.reason else f"{self.path}: {self.reason}"

    @property
    def file_state(self) -> tuple[Path, int]:
        """The file and its modification time: it is worth another attempt only after it has changed."""
        return self.path, modified(self.path)


def modified(path: Path) -> int:
    """Return the modification time of a file in nanoseconds; 0 if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def failure_of(path: Path, error: Exception) -> Failure:
    """Return the failure of a file that cannot be read."""
    age = max(0.0, time.time() - modified(path) / 1e9)
    if isinstance(error, IncompleteFile) and age < SETTLE_SECONDS:
        hint = f"It changed {age:.0f} s ago and is probably still being written: --watch waits for it."
        return Failure(path, f"{error} {hint}", is_settled=False)
    return Failure(path, str(error))


@dataclass(frozen=True)
class Setting:
    """Settings of one score file."""

    metrics: Mapping[str, Metric]  # by name, with the arguments of the protocol
    protocol: str = DEFAULT_PROTOCOL
    seed: int = PROTOCOL_SEED  # of every metric's random generator
    standardized: bool = False  # whether each unit is divided by its standard deviation
    information: bool = False  # whether the record also holds the mutual information of units and factors
    pictured: tuple[str, ...] = ()  # metrics whose tasks the record must hold even if the score is known, for reports
    variant: str = ""  # REPLICATE or a key of VARIANTS, for the trust report; scores have none

    @property
    def variant_file(self) -> str:
        """Name of the score file of a replicate or variant."""
        return f"{self.variant}-{self.seed}.json" if self.variant == REPLICATE else f"{self.variant}.json"

    @property
    def is_published(self) -> bool:
        """Whether scores are those of ``results.json``: DisDiff's protocol with its seed, units as they are."""
        return (self.protocol, self.seed, self.standardized) == (DEFAULT_PROTOCOL, PROTOCOL_SEED, False)


@dataclass
class ScorePlan:
    """One score file: a representation file scored with one seed by one protocol.

    Results in the score file of a run are never changed, because other programs may have written them. Results in the
    score file of a file of latents (``is_own``), of other metrics too, are kept only if the record confirms them: files
    with equal content, equal settings. Checksums are computed only if a score is missing or ``is_own``.
    """

    latents: files.LatentFile
    factors: Factors
    dataset: dict[str, Any]  # description of the data set, for the record
    setting: Setting
    target: Path  # the score file
    is_own: bool = False
    record: Path | None = None  # None means files.record_file(target)
    tasks: dict[str, Task] = field(init=False)
    earlier_scores: dict[str, Any] = field(init=False)  # content of the score file that is kept

    def __post_init__(self) -> None:
        metrics = {INFORMATION.key: INFORMATION, **self.setting.metrics}
        self._tasks_of = {name: self._divided(name, metric) for name, metric in metrics.items()}
        self.tasks = {task.name: task for tasks in self._tasks_of.values() for task in tasks}
        self.record = self.record or files.record_file(self.target)
        self.earlier_scores = files.read_score_file(self.target) if self.target.is_file() else {}
        if self.is_own:
            self.earlier_scores = self._confirmed_scores()

    @functools.cached_property
    def _origin(self) -> dict[str, Any]:
        """Everything that all results of this file depend on."""
        return {
            "latents": self.latents.checksum,
            "factors": dict(zip(self.factors.names, self.factors.sizes)),
            "table": self.factors.digest,
            "standardized": self.setting.standardized,
            "seed": self.setting.seed,
            **({"variant": self.setting.variant} if self.setting.variant else {}),
        }

    def _confirmed_scores(self) -> dict[str, Any]:
        """Return the scores of other metrics in the score file that the record confirms; log those that are replaced.

        Means over several seeds are not: the score files of the seeds have their scores.
        """
        kept = {
            entry.get("key")
            for name, entry in files.read_record(self.record).items()
            if name not in self.tasks and self._is_valid(name, entry)
        }
        means = {REASON, files.DEVIATION_KEY, files.SEEDS_KEY}.union(
            *self.earlier_scores.get(files.SEEDS_KEY, {}).values()
        )
        tasks_of = {metric.key: self._tasks_of[name] for name, metric in self.setting.metrics.items()}
        same = {key for key, tasks in tasks_of.items() if all(task.name in self._kept for task in tasks)}
        replaced = ", ".join(sorted(self.earlier_scores.keys() - kept - same - means))
        if replaced:
            logger.warning("%s: replaced: scores of other latents, factors or settings (%s)", self.target, replaced)
        return {key: result for key, result in self.earlier_scores.items() if key in kept - tasks_of.keys() - means}

    @property
    def label(self) -> str:
        """Name in log messages."""
        if self.is_own:
            return self.latents.path.name
        return f"{self.latents.run_dir.resolve().name}: step {self.latents.num_samples}"

    @property
    def missing(self) -> list[Task]:
        """Tasks still to be computed; empty once the score file holds every metric."""
        metrics, pictured = self.setting.metrics.items(), self.setting.pictured
        wanted = [name for name, metric in metrics if metric.key not in self.earlier_scores or name in pictured]
        names = {task.name for name in wanted for task in self._tasks_of[name]}
        if not names and not pictured:
            return []
        if self.setting.information and (names - self._kept.keys() or pictured):
            names.add(INFORMATION.key)
        return [task for task in self.tasks.values() if task.name in names and task.name not in self._kept]

    @property
    def is_done(self) -> bool:
        """Whether the score file holds every metric and no files of an interrupted command are left."""
        is_written = all(metric.key in self.earlier_scores for metric in self.setting.metrics.values())
        return is_written and not self.missing and not self._tasks_folder.is_dir()

    def add(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Store the outcome of a task on disk."""
        key = {INFORMATION.key: INFORMATION, **self.setting.metrics}[name.partition("/")[0]].key
        about = {"name": name, "key": key, "protocol": self.setting.protocol, "dataset": self.dataset}
        self._kept[name] = {**about, **self._identity(self.tasks[name]), **outcome}
        path = self._tasks_folder / f"{name.replace('/', '-')}.json"
        try:
            write_json(path, self._kept[name])
        except FileNotFoundError:  # another command has just finished this score file and removed the folder
            write_json(path, self._kept[name])

    def finish(self, failures: list[Failure]) -> bool:
        """Write record and score file from the results so far; return whether the score file is new or longer.

        Metrics in the score file are not changed. Metrics whose parts cannot be joined are added to ``failures``. The
        files of earlier latents of ``is_own`` remain if there is no score of the new ones.
        """
        joined: dict[str, Any] = {}
        for name, metric in self.setting.metrics.items():
            results = [self._kept[task.name]["result"] for task in self._tasks_of[name] if task.name in self._kept]
            if len(results) < len(self._tasks_of[name]):
                continue
            try:
                joined[metric.key] = results[0] if metric.join is None else plain(metric.join(results))
            except Exception as error:  # a defect of one metric
                failures.append(Failure(self.latents.path, f"{name}: {type(error).__name__}: {error}"))
        content = {**joined, **self.earlier_scores}
        if self.is_own and not content:
            return False
        reasons = {key: "the metric has no value" for key, result in content.items() if result is None}
        content |= {REASON: self.earlier_scores.get(REASON, {}) | reasons} if reasons else {}
        positions = {metric.key: position for position, metric in enumerate(ALL_METRICS.values())}
        content = dict(sorted(content.items(), key=lambda entry: positions.get(entry[0], len(positions))))
        earlier, before = files.read_record(self.record), self.earlier_scores
        is_new = content.keys() != before.keys()
        if is_new:  # before the record, which confirms it
            write_json(self.target, content)
            self.earlier_scores = content
        recorded = {name: entry for name, entry in earlier.items() if _key(name, entry) in before} | self._kept
        if recorded != earlier:
            write_json(self.record, {"parts": recorded})
        shutil.rmtree(self._tasks_folder, ignore_errors=True)
        return is_new

    def _divided(self, name: str, metric: Metric) -> list[Task]:
        """Return the tasks of a metric: one, or one per factor."""
        units, sizes, arguments = self.latents.shape[1], self.factors.sizes, dict(metric.protocol)
        if not metric.reduce:
            units = int(np.prod(self.latents.shape[1:]))
        if metric.part is None:
            return [Task(name, metric.function, None, arguments, metric.seconds(units, max(sizes)), metric.reduce)]
        return [
            Task(f"{name}/{factor}", metric.part, factor, arguments, metric.seconds(units, size), metric.reduce)
            for factor, size in enumerate(sizes)
        ]

    def _identity(self, task: Task) -> dict[str, Any]:
        """Return everything a result depends on; kept results with another identity are ignored."""
        return {**self._origin, "arguments": json.loads(json.dumps(task.arguments, default=float))}

    @property
    def _tasks_folder(self) -> Path:
        return self.record.with_suffix("")

    @functools.cached_property
    def _kept(self) -> dict[str, dict[str, Any]]:
        """Return results of earlier commands by task, from the record and from the files of single tasks."""
        results = files.read_record(self.record)
        for path in self._tasks_folder.glob("*.json"):
            entry = files.read_mapping(path)
            if "name" in entry:
                results[entry["name"]] = entry
        return {name: entry for name, entry in results.items() if self._is_valid(name, entry)}

    def _is_valid(self, name: str, entry: Mapping[str, Any]) -> bool:
        identity = self._identity(self.tasks[name]) if name in self.tasks else self._origin
        return all(entry.get(key) == value for key, value in identity.items())


def _key(name: str, entry: Mapping[str, Any]) -> str | None:
    """Return the JSON key of the metric of a task in a record."""
    metric = ALL_METRICS.get(name.partition("/")[0])
    return entry.get("key", metric and metric.key)


@dataclass
class FilePlan:
    """One representation file: a score plan for each seed, on the same reduced latents."""

    latents: files.LatentFile
    scores: list[ScorePlan]

    def has_tasks(self) -> bool:
        """Return whether tasks are left, whose results belong to the content that the file has now."""
        return any(score.missing for score in self.scores) and bool(self.latents.checksum)

    @property
    def prepare_seconds(self) -> float:
        """Estimated seconds for reducing the latents."""
        return 1.0 + float(np.prod(self.latents.shape, dtype=np.float64)) / PREPARE_VALUES_PER_SECOND

    @property
    def seconds(self) -> float:
        """Estimated seconds of all its tasks."""
        return self.prepare_seconds + sum(task.seconds for score in self.scores for task in score.missing)


def plan_run(
    run_dir: Path,
    dataset: str | None,
    settings: Sequence[Setting],
    for_report: bool,
    skip: frozenset[tuple[Path, int]],
    failures: list[Failure],
    num_replicates: int | None = None,
) -> list[FilePlan]:
    """Plan the representation files of a run whose scores are not complete.

    Args:
        run_dir: the run.
        dataset: name of a factor space for files without metadata.
        settings: settings of each seed.
        for_report: whether the tasks that a report draws are computed for the latest file.
        skip: ``Failure.file_state`` of files to leave out.
        failures: receives the files that cannot be scored.
        num_replicates: replicates of the trust report of the latest file; None if there is no report.
    """
    paths = [path for path in files.latent_paths(run_dir) if (path, modified(path)) not in skip]
    headers = _read_headers(paths, failures)
    plans = []
    for step, latents in headers.items():
        pictured = PICTURED if for_report and step == max(headers) else ()
        try:
            space = space_of(latents, dataset)
            factors, about = Factors.of_space(space), describe_dataset(run_dir, space, dataset)
            scores = []
            for setting in settings:
                target = files.score_file(run_dir, step, setting.seed, setting.protocol, setting.standardized)
                scores.append(ScorePlan(latents, factors, about, replace(setting, pictured=pictured), target))
            scores += variant_plans(scores[0], num_replicates if step == max(headers) else None)
        except (UserError, ConfigError, OSError) as error:
            failures.append(failure_of(latents.path, error))
            continue
        scores = [score for score in scores if not score.is_done]
        plans += [FilePlan(latents, scores)] if scores else []
    return plans


def trust_settings(setting: Setting, num_replicates: int, num_units: int) -> list[Setting]:
    """Return the settings of the replicates and variants of a score."""
    base = replace(setting, information=False, pictured=())
    seeds = range(base.seed + 1, base.seed + 1 + num_replicates)
    names = [name for name in VARIANTS if name != REMOVED or num_units > 2]  # most metrics compare units
    replicates = [replace(base, seed=seed, variant=REPLICATE) for seed in seeds]
    return replicates + [replace(base, variant=name) for name in names]


def variant_plans(score: ScorePlan, num_replicates: int | None) -> list[ScorePlan]:
    """Return the plans of the replicates and variants of a score; none if ``num_replicates`` is None."""
    if num_replicates is None:
        return []
    folder = files.trust_folder(score.target)
    return [
        ScorePlan(score.latents, score.factors, score.dataset, setting, folder / setting.variant_file, is_own=True)
        for setting in trust_settings(score.setting, num_replicates, score.latents.shape[1])
    ]


def _read_headers(paths: Iterable[Path], failures: list[Failure]) -> dict[int, files.LatentFile]:
    """Read the headers of a run's files by step; of two files with the same step, the later one is used."""
    headers: dict[int, files.LatentFile] = {}
    for path in paths:
        try:
            latents = files.read_latent_file(path)
        except (UserError, ConfigError, OSError) as error:
            failures.append(failure_of(path, error))
            continue
        older = headers.get(latents.num_samples)
        if older is not None:
            logger.warning("%s: ignored, because %s has the same step %d", older.path, path.name, latents.num_samples)
        headers[latents.num_samples] = latents
    return headers


def factors_of_latents(
    latents: files.LatentFile,
    dataset: str | None,
    table: str | Path | None,
    target: Path,
    missing: str = "error",
    bins: Mapping[str, Bins] | None = None,
) -> tuple[Factors, dict[str, Any]]:
    """Return the factors of a file of latents, and the description of its data set.

    They come from a published factor space (``dataset``), a table that is read and written to ``target`` by
    ``factors_from_table``, or the file.

    Raises:
        UserError: nothing gives the factors, or they belong to another number of images.
        ConfigError: unknown data set.
    """
    if dataset is not None and table is not None:
        raise UserError("expected a data set (-d) or a table of factors (--factors), not both")
    if table is not None:
        factors = factors_from_table(Path(table), latents.shape, target, missing, bins)
        return factors, factors.describe(None, {"table": Path(table).name})
    space = factor_space(dataset) if dataset is not None else latents.space
    if space is None:
        raise UserError(
            f"{latents.path}: the factors of its rows are not stored in the file. Name their data set (-d shapes3d, "
            "mpi3d, cars3d, dsprites, smallnorb), or pass a table with one row of factors per image (--factors f.npy)."
        )
    try:
        check_latents(latents.shape, space.size)
    except MetricError as error:
        raise UserError(f"{latents.path}: {error}") from error
    factors = Factors.of_space(space)
    return factors, factors.describe(dataset, {}) if dataset else describe_dataset(latents.run_dir, space)
