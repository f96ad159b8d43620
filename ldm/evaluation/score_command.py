"""The scoring command: progress on the terminal, the table, and one line for each thing that went wrong."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.evaluation.score_files import LATENTS_FOLDER, latent_paths
from ldm.evaluation.score_table import collect_rows, score_table, write_csv
from ldm.evaluation.scoring import ProgressListener, Report, file_state, score_folder

logger = logging.getLogger(__name__)

TABLE_WIDTH = 160  # of the table in a file or pipe, where no terminal says how wide it is


def run_scoring(
    logdir: str, processes: int, dataset: str | None, seed: int, watch: float | None, csv: str | None
) -> int:
    """Score what has no score yet, show the table, and end; with ``watch`` look again every so many seconds.

    Args:
        logdir: a run folder, or any folder above runs.
        processes: number of worker processes.
        dataset: name of a factor space for files that do not say theirs.
        seed: of the metrics' random generators.
        watch: seconds between looks; None ends after the first.
        csv: file for the figures of all scored checkpoints.

    Returns:
        Exit status: 0 if all went well, 1 if something could not be scored.

    Raises:
        UserError: no such folder.
    """
    messages = Console(stderr=True)  # the bar and the messages; the table alone goes to standard output
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LineHandler(messages)])
    failed: frozenset[tuple[Path, int]] = frozenset()
    first = True
    while True:
        with _progress_bar(messages) as on_progress:
            report = score_folder(logdir, processes, dataset, seed, on_progress=on_progress, skip=failed)
        if first or report.written or report.failures:
            _show(report, logdir, seed, csv)
        if watch is None:
            return 1 if report.failures else 0
        failed |= {file_state(failure) for failure in report.failures}
        first = False
        time.sleep(watch)


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


def _show(report: Report, logdir: str, seed: int, csv: str | None) -> None:
    """The table and what went wrong; says what to do when there is nothing to show."""
    rows = collect_rows(logdir, seed)
    without = [str(run) for run in report.runs if not latent_paths(run)]
    if rows:
        Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(score_table(rows))
    elif not report.failures:
        logger.info("No scores yet: no run at or below %s holds %s/epoch=NNNNNN.npz.", logdir, LATENTS_FOLDER)
    if without:
        logger.info(
            "%d of %d runs hold no %s/*.npz (the test stage writes it): %s",
            len(without),
            len(report.runs),
            LATENTS_FOLDER,
            ", ".join(without),
        )
    if csv is not None:
        write_csv(csv, rows)
        logger.info("%d scored checkpoints written to %s", len(rows), csv)
    for failure in report.failures:
        where = "" if str(failure.path) in failure.reason else f"{failure.path}: "
        logger.error("not scored: %s%s", where, failure.reason)
