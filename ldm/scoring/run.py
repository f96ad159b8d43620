"""Scoring of run folders and of single files: plans what is missing, runs it in the engine, stores the results."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED, Metric, select_metrics
from ldm.metrics.evaluate import SCALED
from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.representation import size_note
from ldm.metrics.trust import VARIANTS
from ldm.runs.disk import remove_leftovers, require_writable
from ldm.runs.lock import exclusive
from ldm.runs.records import REASON, read_json, write_json
from ldm.scoring import files
from ldm.scoring.arrays import IncompleteFile
from ldm.scoring.engine import Engine, Job, Outcome, Workspace, compute, prepare, signals_deferred
from ldm.scoring.factors import parse_bins
from ldm.scoring.plan import (
    Failure,
    FilePlan,
    ScorePlan,
    Setting,
    factors_of_latents,
    failure_of,
    plan_run,
    variant_plans,
)
from ldm.util import UserError, owner_mark

logger = logging.getLogger(__name__)

ProgressListener = Callable[[float, float], None]  # (estimated seconds of work done, in total)
PREPARE = "prepare"  # name of the job that reduces latents to units


@dataclass(frozen=True)
class Options:
    """What is scored, and how: the options of ``run_para_metrics.py``.

    Latents are (N, K) codes, used as they are, or (N, U, D) vectors per unit, each reduced to its first principal
    component. Row i belongs to image i.
    """

    logdir: str | Path = "logs"  # a run folder, or any folder above runs
    processes: int = 1
    dataset: str | None = None  # name of a factor space for files without metadata
    metrics: Sequence[str] | Mapping[str, Metric] | None = None  # names, or metrics by name; None: the protocol's
    protocol: str = DEFAULT_PROTOCOL
    seeds: str = str(PROTOCOL_SEED)  # of the metrics' random generators: "0", "0-9", "0,3"; published scores use 0
    scheduler: str | None = None  # address of a Dask scheduler to use instead of processes of this machine
    latents: str | Path | None = None  # a file to score instead of runs: .npz, .npy, .h5, .parquet or .csv
    factors: str | Path | None = None  # with latents: a table (N, F) of each image's factors instead of dataset
    out: str | Path | None = None  # with latents: the score file; None means <latents>.scores.json
    missing: str = "error"  # with factors: "drop" leaves out rows without a value of a factor
    bins: Sequence[str] = ()  # with factors: bins of continuous factors, see ``parse_bins``
    standardize: bool = False  # whether each unit is divided by its standard deviation; stored separately
    report: bool = False  # whether HTML reports are written, and what they draw is computed
    watch: float | None = None  # seconds between two searches for new files
    csv: str | None = None
    latex: str | None = None
    markdown: str | None = None
    trust: int | None = None  # replicates of the trust report; None if there is none

    def settings(self) -> list[Setting]:
        """Return the settings of each seed.

        Raises:
            UserError: ``seeds`` has another form.
            ConfigError: unknown metric or protocol.
        """
        is_chosen = isinstance(self.metrics, Mapping)
        metrics = self.metrics if is_chosen else select_metrics(self.protocol, self.metrics)
        seeds = files.parse_seeds(self.seeds)
        if self.trust is not None and self.trust < 2:
            raise UserError(f"--trust: expected at least 2 replicates, got {self.trust}")
        return [Setting(metrics, self.protocol, seed, self.standardize, information=seed == seeds[0]) for seed in seeds]

    @property
    def score_file(self) -> Path:
        """Score file of ``latents``."""
        source, kind = Path(self.latents), f".{files.STANDARDIZED}" if self.standardize else ""
        return Path(self.out) if self.out else source.with_name(f"{source.stem}{kind}.scores.json")

    def check_files(self) -> None:
        """Check that no output overwrites an input, another output (through a link either) or a file of other content.

        Raises:
            UserError: it does.
        """
        if self.out is not None and Path(self.out).is_dir():
            raise UserError(f"--out: expected a file, got the folder {self.out}. Add a name.")
        inputs = [Path(path) for path in (self.latents, self.factors) if path is not None]
        tables = [Path(path) for path in (self.csv, self.latex, self.markdown) if path is not None]
        scores = [self.score_file, record_of(self)] if self.latents is not None else []
        outputs = [*scores, *tables]
        for number, output in enumerate(outputs):
            if any(files.is_same_file(output, path) for path in inputs):
                raise UserError(f"{output}: expected another output, got an input (--latents, --factors). Rename it.")
            if output.is_dir() or any(files.is_same_file(output, path) for path in outputs[:number]):
                found = "a folder" if output.is_dir() else "that of another option or the record of --out"
                raise UserError(f"{output}: expected a file of its own for each output, got {found}. Rename it.")
        for output in scores:
            is_scores = False
            with contextlib.suppress(UserError):
                content, known = read_json(output, missing_ok=True), {metric.key for metric in ALL_METRICS.values()}
                is_known = content.keys() & known.union(["parts", files.SEEDS_KEY])
                is_scores = not content or is_known or output.with_suffix(".record.json").is_file()
                is_scores = is_scores and all(isinstance(entry, (dict, type(None))) for entry in content.values())
            if not is_scores:
                raise UserError(f"{output}: expected a score file or a new file (--out), got another. Rename it.")


@dataclass
class Report:
    """Result of scoring: run folders found, score files written, files and tasks that could not be scored."""

    runs: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def score_folder(
    options: Options,
    on_progress: ProgressListener = lambda done, total: None,
    skip: frozenset[tuple[Path, int]] = frozenset(),
) -> Report:
    """Score every representation file at or below ``options.logdir`` with the metrics that its score file lacks.

    Args:
        options: what is scored, and how.
        on_progress: called with the estimated seconds of work done and in total.
        skip: ``Failure.file_state`` of files to leave out.

    Returns:
        The score files written, and failures; a failure never stops other jobs.

    Raises:
        UserError: the folder does not exist, or no scheduler answers.
        ConfigError: unknown metric or protocol.
    """
    settings = options.settings()
    options.check_files()
    report = Report(runs=files.find_runs(options.logdir))
    plans: list[FilePlan] = []
    with contextlib.ExitStack() as locks:
        for run_dir in report.runs:
            arguments = (run_dir, options.dataset, settings, options.report, skip)
            failures: list[Failure] = []
            found = plan_run(*arguments, failures, options.trust)
            try:
                if locks.enter_context(_locked(run_dir, found)) and found:
                    failures.clear()  # the other command has scored it
                    found = plan_run(*arguments, failures, options.trust)
            except UserError as error:
                failures, found = [Failure(run_dir, str(error))] if found else failures, []
            report.failures += failures
            plans += found
        _run_plans(plans, options, report, Path(options.logdir), on_progress)
    return report


@contextlib.contextmanager
def _locked(run_dir: Path, plans: Sequence[FilePlan]) -> Iterator[bool]:
    """Wait for another command that scores a run, and yield whether there was one; complete what a killed one has left.

    Raises:
        UserError: the scores cannot be written, or there are no plans and another command scores the run.
    """
    lock = run_dir / ".scores.lock"
    was_killed = lock.exists()
    if not plans and not was_killed:
        yield False
        return
    if plans:
        advice = "Change its permissions, or score files with --latents FILE --out FILE"
        require_writable(plans[0].scores[0].target.parent, advice)
    with exclusive(lock, f"scores of {run_dir}", wait=bool(plans)) as was_held:
        if was_killed and not was_held:
            remove_leftovers(run_dir)
            remove_leftovers(Path(tempfile.gettempdir()), ".scores-*")
            files.publish_latest(run_dir)
        yield was_held


def score_latents(options: Options, on_progress: ProgressListener = lambda done, total: None) -> Report:
    """Score the latents of one file, ``options.latents``.

    The score file holds the metrics' dicts by their keys; with several seeds their means, ``deviation`` and ``seeds``.
    ``.record.json`` beside it holds protocol, data set and versions.

    Returns:
        The file written, and failures; a failure never stops other metrics.

    Raises:
        UserError: the file or the factors cannot be read, or do not match.
        ConfigError: unknown metric, protocol or data set.

    Example:
        >>> score_latents(Options(latents="z.npy", dataset="shapes3d", out="scores.json"))  # doctest: +SKIP
    """
    source, target, settings = Path(options.latents), options.score_file, options.settings()
    options.check_files()
    bins = parse_bins(options.bins)
    report = Report()
    try:
        header = files.read_latent_file(source, is_any=True)
    except IncompleteFile as error:
        report.failures.append(failure_of(source, error))
        return report
    require_writable(target.parent, "Choose another file with --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, ".*.tmp")
    lock = exclusive(target.with_name(f".{target.name}.lock"), f"scores in {target}", wait=True)
    with lock, scratch_folder(target.parent) as scratch:
        where = (options.dataset, options.factors, scratch / "factors.npz")
        factors, about = factors_of_latents(header, *where, options.missing, bins)
        scores = [
            ScorePlan(header, factors, about, setting, path, True, record)
            for setting, (path, record) in zip(settings, _score_files(target, settings))
        ]
        earlier = {}  # scores of a single seed, of other metrics
        if len(scores) > 1:
            record = target.with_suffix(".record.json")
            earlier = ScorePlan(header, factors, about, settings[0], target, True, record).earlier_scores
        plan = FilePlan(header, scores + variant_plans(scores[0], options.trust))
        _run_plans([plan], options, report, target.parent, on_progress)
    if len(scores) > 1:
        _write_summary(target, scores, earlier)
        report.written = [target]
    return report


def _score_files(target: Path, settings: Sequence[Setting]) -> list[tuple[Path, Path]]:
    if len(settings) == 1:
        return [(target, target.with_suffix(".record.json"))]
    names = [target.with_suffix(".seeds") / f"seed={setting.seed}" for setting in settings]
    return [(name.with_suffix(".json"), name.with_suffix(".record.json")) for name in names]


def first_score_file(options: Options) -> Path:
    """Return the score file of the first seed of a file of latents."""
    return _score_files(options.score_file, options.settings())[0][0]


def record_of(options: Options) -> Path:
    """Return the record of a file of latents, that of the first seed."""
    return _score_files(options.score_file, options.settings())[0][1]


def _write_summary(target: Path, scores: Sequence[ScorePlan], earlier: Mapping[str, Any]) -> None:
    """Write mean, deviation and all values over seeds to one file, beside earlier scores of a single seed."""
    found = {str(score.setting.seed): files.read_score_file(score.target) for score in scores if score.target.is_file()}
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    for key in dict.fromkeys(key for content in found.values() for key in content if key != REASON):
        results = [content[key] for content in found.values() if key in content]
        means[key], deviations[key] = files.over_seeds(results)
        figures = [result if isinstance(result, Mapping) else {} for result in results]
        nulls = Counter(name for result in figures for name, value in result.items() if value is None)
        means[key] |= {name: None for name, count in nulls.items() if name not in means[key]}
        reasons = {name: f"null for {count} of {len(results)} seeds" for name, count in nulls.items()}
        means[key] = means[key] | ({REASON: reasons} if reasons else {}) or None
    reasons = {key: f"null for {len(found)} seeds" for key, result in means.items() if result is None}
    summary = {**means, files.DEVIATION_KEY: deviations, files.SEEDS_KEY: found}
    write_json(target, {**earlier, **summary, **({REASON: reasons} if reasons else {})})


def _run_plans(
    plans: Sequence[FilePlan], options: Options, report: Report, shared_folder: Path, on_progress: ProgressListener
) -> None:
    """Run all tasks of some plans; workers of a cluster share a scratch folder in ``shared_folder``."""
    if not plans:
        on_progress(0.0, 0.0)
        return
    for rows in dict.fromkeys(score.factors.rows for plan in plans for score in plan.scores):
        logger.info("training and test codes of metrics that predict factors: %s", rows)
    num_tasks = sum(len(score.missing) for plan in plans for score in plan.scores)
    with scratch_folder(None if options.scheduler is None else shared_folder) as scratch:
        with Engine(max(1, min(options.processes, num_tasks)), scratch, options.scheduler) as engine:
            _Scoring(plans, scratch, engine, report, on_progress).run(max(options.processes, engine.num_workers) + 1)


@contextlib.contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """Create a temporary folder, and remove those of commands that were killed on this machine."""
    try:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        remove_leftovers(parent, ".scores-*")
        folder = (parent / f".scores-{owner_mark()}").resolve()
        folder.mkdir(mode=0o700)
    except OSError as error:
        advice = "Free some space, or set the environment variable TMPDIR to another folder"
        raise UserError(f"{parent or 'TMPDIR'}: no temporary folder can be created ({error}). {advice}") from error
    try:
        yield folder
    finally:
        with signals_deferred():
            shutil.rmtree(folder, ignore_errors=True)


class _Scoring:
    """Runs the plans of all files in one engine, a few files at a time to bound the size of the scratch folder."""

    def __init__(
        self, plans: Sequence[FilePlan], scratch: Path, engine: Engine, report: Report, on_progress: ProgressListener
    ) -> None:
        self._plans = sorted(plans, key=lambda plan: -plan.seconds)  # the largest file first
        self._next = iter(range(len(plans)))
        self._scratch, self._engine, self._report, self._on_progress = scratch, engine, report, on_progress
        self._unfinished: dict[int, int] = {}  # number of a file -> jobs without an outcome
        self._done_seconds, self._total_seconds = 0.0, sum(plan.seconds for plan in plans)

    def run(self, count: int) -> None:
        """Score all files, at most ``count`` at a time."""
        self._on_progress(0.0, self._total_seconds)
        for _ in range(count):
            self._start_file()
        for outcome in self._engine.outcomes():
            self._take(outcome)

    def _start_file(self) -> None:
        """Start the next file that has tasks; files without only lack their score file, which is written."""
        for number in self._next:
            plan = self._plans[number]
            if plan.has_tasks():
                self._unfinished[number] = 1
                self._engine.submit(Job((number, 0, PREPARE), prepare, (self._workspace(number),)), plan.seconds)
                return
            self._finish(plan)

    def _workspace(self, number: int) -> Workspace:
        plan = self._plans[number]
        standardized = plan.scores[0].setting.standardized
        return Workspace(plan.latents.path.resolve(), self._scratch / str(number), standardized)

    def _take(self, outcome: Outcome) -> None:
        """Store the result of a job, or its failure, and submit the jobs that depend on it."""
        number, index, name = outcome.job.key
        plan = self._plans[number]
        score = plan.scores[index]
        self._done_seconds += plan.prepare_seconds if name == PREPARE else score.tasks[name].seconds
        if outcome.error is not None:
            where = "" if name == PREPARE else f"{name.partition('/')[0]}: "  # one failure for all factors
            self._fail(score, where + outcome.error)
            self._done_seconds += plan.seconds - plan.prepare_seconds if name == PREPARE else 0.0
        elif name == PREPARE:
            note = outcome.result if score.setting.metrics.keys() & SCALED else None
            for text in filter(None, (note, size_note(*plan.latents.shape[:2]))):
                logger.warning("%s: %s", plan.latents.path, text)
            self._submit_tasks(number)
        else:
            score.add(name, outcome.result)
        self._unfinished[number] -= 1
        if not self._unfinished[number]:
            shutil.rmtree(self._scratch / str(number), ignore_errors=True)
            self._finish(plan)
            self._start_file()
        self._on_progress(self._done_seconds, self._total_seconds)

    def _fail(self, score: ScorePlan, reason: str) -> None:
        """Add a failure once, and that of a variant only if the score itself does not fail in the same way."""
        variant, path, failures = score.setting.variant, score.latents.path, self._report.failures
        if not variant:
            failures[:] = [found for found in failures if not (found.path == path and found.reason.endswith(reason))]
        elif Failure(path, reason) in failures:
            return
        heading = f"{VARIANTS[variant].heading if variant in VARIANTS else variant}: " if variant else ""
        failure = Failure(path, heading + reason)
        failures += [failure] if failure not in failures else []

    def _submit_tasks(self, number: int) -> None:
        for index, score in enumerate(self._plans[number].scores):
            for task in score.missing:
                setting = score.setting
                arguments = (task, self._workspace(number), score.factors, setting.seed, setting.variant)
                self._engine.submit(Job((number, index, task.name), compute, arguments), task.seconds)
                self._unfinished[number] += 1

    def _finish(self, plan: FilePlan) -> None:
        """Write the score files, and the figures of a run to its results.json."""
        for score in plan.scores:
            if not score.finish(self._report.failures) or score.setting.variant:
                continue
            self._report.written.append(score.target)
            seed = "" if score.setting.seed == PROTOCOL_SEED else f", seed {score.setting.seed}"
            logger.info("%s scored%s", score.label, seed)
            if not score.is_own and score.setting.is_published:
                try:
                    files.publish_latest(plan.latents.run_dir)
                except UserError as error:
                    self._report.failures.append(Failure(score.target, str(error)))
