"""The scoring command: scores what is missing, shows progress and the table, and reports failures."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.scoring.files import LATENTS_FOLDER, latent_paths, score_file
from ldm.scoring.run import Options, ProgressListener, Report, first_score_file, record_of, score_folder, score_latents
from ldm.scoring.table import Row, collect_rows, latents_row, score_tables, write_csv, write_latex, write_markdown
from ldm.scoring.text_table import text_tables
from ldm.scoring.trust import Trust, collect_trust, trust_table
from ldm.util import UserError

logger = logging.getLogger(__name__)

TABLE_WIDTH = 240  # characters of the table in a file or pipe


def run_scoring(options: Options) -> int:
    """Run the command; with ``watch``, search for new files until interrupted.

    Returns:
        Exit status: 0 on success, 1 if something could not be scored.

    Raises:
        UserError: a folder or file does not exist, or options exclude each other.
        ConfigError: unknown metric, protocol or data set.
    """
    messages = Console(stderr=True)  # progress bar and messages; standard output has the table only
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LineHandler(messages)])
    if options.latents is None and (options.factors or options.out):
        raise UserError(f"{'--factors' if options.factors else '--out'} requires --latents FILE")
    if options.factors is None and (options.bins or options.missing != "error"):
        raise UserError(f"{'--bins' if options.bins else '--missing'} requires --factors FILE")
    if options.latents is not None and options.watch is not None:
        raise UserError("--watch searches for files of runs (-l) and cannot be combined with --latents")
    failed: frozenset[tuple[Path, int]] = frozenset()
    is_first = True
    while True:
        with _progress_bar(messages) as on_progress:
            if options.latents is not None:
                report = score_latents(options, on_progress)
            else:
                report = score_folder(options, on_progress, failed)
        failures = [failure for failure in report.failures if failure.is_settled or options.watch is None]
        if is_first or report.written or failures:
            _show(report, options)
        for failure in failures:
            logger.error("not scored: %s", failure)
        if options.watch is None:
            return 1 if failures else 0
        failed |= {failure.file_state for failure in failures}
        is_first = False
        time.sleep(options.watch)


class _LineHandler(logging.Handler):
    """Prints log messages above the progress bar, each on one line."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def _progress_bar(console: Console) -> Iterator[ProgressListener]:
    """Show a bar of the estimated work, on a terminal only."""
    columns = (TextColumn("scoring"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    columns += (TextColumn("left:"), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden, speed_estimate_period=600) as progress:
        task = progress.add_task("scoring", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=total > 0)


def _show(report: Report, options: Options) -> None:
    """Write table, files and reports, and explain why there is nothing to show."""
    seeds = [setting.seed for setting in options.settings()]
    if options.latents is not None:
        about = (options.score_file, seeds, options.dataset, options.standardize)
        rows = latents_row(options.latents, *about) if report.written else []
    else:
        rows = collect_rows(options.logdir, seeds, options.protocol, options.standardize)
    trusts = _trust(options, rows)
    _write_tables(options, rows, trusts)
    if options.latents is not None and rows:
        logger.info("scores: %s", options.score_file)
    elif options.latents is None:
        _explain(report, options, rows)
    if options.report and rows:
        from ldm.scoring.report.build import write_latents_report, write_reports

        if options.latents is not None:
            written = [write_latents_report(rows[0], record_of(options), options.score_file, trusts)]
        else:
            written = write_reports(options.logdir, rows, options.protocol, trusts)
        for path in written:
            logger.info("report: %s", path)


def _explain(report: Report, options: Options, rows: Sequence[Row]) -> None:
    """Log which runs have nothing to score."""
    without = [str(run) for run in report.runs if not latent_paths(run)]
    if not rows and not report.failures:
        logger.info("No scores: no run at or below %s has %s/epoch=NNNNNN.npz.", options.logdir, LATENTS_FOLDER)
    if without:
        counts, names = (len(without), len(report.runs)), ", ".join(without)
        logger.info("%d of %d runs have no %s/*.npz, which the test stage writes: %s", *counts, LATENTS_FOLDER, names)


def _trust(options: Options, rows: Sequence[Row]) -> list[Trust]:
    """Return replicates and variants of the latest scores; none without ``--trust``."""
    if options.trust is None:
        return []
    setting, trusts = options.settings()[0], []
    for row in (row for row in rows if row.latest):
        if options.latents is not None:
            target = first_score_file(options)
        else:
            target = score_file(row.run_dir, row.step, setting.seed, setting.protocol, setting.standardized)
        trusts += collect_trust(row, target, setting, options.trust)
    return trusts


def _write_tables(options: Options, rows: list[Row], trusts: Sequence[Trust]) -> None:
    further = [trust_table(trusts, options.protocol)] if trusts else []
    if rows:
        console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
        found = (score_tables(rows, console.width), *(text_tables(content, console.width) for content in further))
        for table in itertools.chain.from_iterable(found):
            console.print(table)
    files = (
        (options.csv, write_csv),
        (options.latex, functools.partial(write_latex, further=further)),
        (options.markdown, functools.partial(write_markdown, further=further)),
    )
    for path, write in files:
        if path is not None and rows:  # else an earlier table stays
            write(path, rows)
            logger.info("%d scored checkpoints written to %s", len(rows), path)
