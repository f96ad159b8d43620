"""The scoring command: progress on the terminal, the table, and one line for each thing that went wrong."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.metrics import DEFAULT_PROTOCOL, Metric, select_metrics
from ldm.scoring.files import LATENTS_FOLDER, latent_paths, parse_seeds
from ldm.scoring.rows import Row, collect_rows
from ldm.scoring.run import ProgressListener, Report, file_state, score_folder
from ldm.scoring.single import record_of, score_file, score_latents, single_row
from ldm.scoring.table import score_tables, write_csv, write_latex, write_markdown
from ldm.util import UserError

logger = logging.getLogger(__name__)

TABLE_WIDTH = 240  # of the table in a file or pipe, where no terminal says how wide it is


@dataclass(frozen=True)
class Options:
    """What the command was asked for; see the help of ``run_para_metrics.py``.

    Attributes:
        logdir: a run folder, or any folder above runs.
        processes: worker processes.
        dataset: name of a factor space for files that do not say theirs.
        metrics: names of metrics; None means what the protocol runs.
        protocol: name of a protocol.
        seeds: of the metrics' random generators: "0", "0-9", "0,3".
        watch: seconds between looks; None ends after the first.
        scheduler: address of a Dask scheduler.
        latents: a file of anyone's latents, scored instead of runs.
        factors: table of its factors.
        out: its score file.
        csv: file for the figures of all scored checkpoints.
        latex: file for the table.
        markdown: file for the table.
        report: whether to write HTML reports.
    """

    logdir: str = "logs"
    processes: int = 1
    dataset: str | None = None
    metrics: Sequence[str] | None = None
    protocol: str = DEFAULT_PROTOCOL
    seeds: str = "0"
    watch: float | None = None
    scheduler: str | None = None
    latents: str | None = None
    factors: str | None = None
    out: str | None = None
    csv: str | None = None
    latex: str | None = None
    markdown: str | None = None
    report: bool = False


def run_scoring(options: Options) -> int:
    """Score what has no score yet, show the table, and end; with ``watch`` look again every so many seconds.

    Returns:
        Exit status: 0 if all went well, 1 if something could not be scored.

    Raises:
        UserError: no such folder or file, or options that exclude each other.
        ConfigError: unknown metric, protocol or data set.
    """
    messages = Console(stderr=True)  # the bar and the messages; the table alone goes to standard output
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LineHandler(messages)])
    _check(options)
    seeds, metrics = parse_seeds(options.seeds), select_metrics(options.protocol, options.metrics)
    if options.latents is not None:
        return _score_file(options, seeds, metrics, messages)
    failed: frozenset[tuple[Path, int]] = frozenset()
    first = True
    while True:
        with _progress_bar(messages) as on_progress:
            report = score_folder(
                options.logdir,
                options.processes,
                options.dataset,
                seeds,
                metrics,
                options.protocol,
                scheduler=options.scheduler,
                for_report=options.report,
                on_progress=on_progress,
                skip=failed,
            )
        failures = [failure for failure in report.failures if failure.is_settled or options.watch is None]
        if first or report.written or failures:
            _show(report, options, seeds)
        for failure in failures:
            where = "" if str(failure.path) in failure.reason else f"{failure.path}: "
            logger.error("not scored: %s%s", where, failure.reason)
        if options.watch is None:
            return 1 if failures else 0
        failed |= {file_state(failure) for failure in failures}
        first = False
        time.sleep(options.watch)


def _check(options: Options) -> None:
    """Options that mean nothing together."""
    if options.latents is None:
        for name in ("factors", "out"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} goes with --latents FILE; runs below -l know their factors and places")
    elif options.watch is not None:
        raise UserError("--watch looks for files of runs (-l); it does not go with --latents")


class _LineHandler(logging.Handler):
    """Log messages above the progress bar, one line each however long."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _progress_bar(console: Console) -> Iterator[ProgressListener]:
    """A bar over the estimated work, on a terminal only and gone when done; with nothing to do it never shows."""
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, speed_estimate_period=600) as progress:
        task = progress.add_task("scoring", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=total > 0)


def _score_file(options: Options, seeds: Sequence[int], metrics: dict[str, Metric], messages: Console) -> int:
    """Score one file of latents."""
    target = score_file(options.latents, options.out)
    with _progress_bar(messages) as on_progress:
        report = score_latents(
            options.latents,
            options.dataset,
            options.factors,
            target,
            metrics,
            protocol=options.protocol,
            seeds=seeds,
            num_workers=options.processes,
            scheduler=options.scheduler,
            for_report=options.report,
            on_progress=on_progress,
        )
    rows = single_row(options.latents, target, seeds, options.dataset) if report.written else []
    _write_tables(options, rows)
    if rows:
        logger.info("scores: %s", target)
        if options.report:
            from ldm.scoring.report.build import write_latents_report

            logger.info("report: %s", write_latents_report(rows[0], record_of(target, seeds), target))
    for failure in report.failures:
        where = "" if str(failure.path) in failure.reason else f"{failure.path}: "
        logger.error("not scored: %s%s", where, failure.reason)
    return 1 if report.failures else 0


def _show(report: Report, options: Options, seeds: Sequence[int]) -> None:
    """Table, files and reports; says what to do when there is nothing to show."""
    rows = collect_rows(options.logdir, seeds, options.protocol)
    without = [str(run) for run in report.runs if not latent_paths(run)]
    _write_tables(options, rows)
    if not rows and not report.failures:
        logger.info("No scores yet: no run at or below %s holds %s/epoch=NNNNNN.npz.", options.logdir, LATENTS_FOLDER)
    if without:
        logger.info(
            "%d of %d runs hold no %s/*.npz (the test stage writes it): %s",
            len(without),
            len(report.runs),
            LATENTS_FOLDER,
            ", ".join(without),
        )
    if options.report and rows:
        from ldm.scoring.report.build import write_reports

        for path in write_reports(options.logdir, rows, options.protocol):
            logger.info("report: %s", path)


def _write_tables(options: Options, rows: list[Row]) -> None:
    """The table on the terminal and in the files that were asked for."""
    if rows:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        for table in score_tables(rows, console.width):
            console.print(table)
    writers: dict[str, Callable[[str, list[Row]], None]] = {
        "csv": write_csv,
        "latex": write_latex,
        "markdown": write_markdown,
    }
    for name, write in writers.items():
        path = getattr(options, name)
        if path is not None:
            write(path, rows)
            logger.info("%d scored checkpoints written to %s", len(rows), path)
