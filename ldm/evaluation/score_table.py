"""One table over runs and seeds from their score files, and the same as CSV."""

from __future__ import annotations

import contextlib
import csv
import logging
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ldm.evaluation.score_files import find_runs, latent_paths, read_latent_file, read_scores
from ldm.evaluation.scoring import figures_of
from ldm.metrics import PROTOCOL_SEED
from ldm.training.run_folder import RESULTS_FILE, RUN_FILE, read_json
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)

# figure -> heading; the last four come from results.json
HEADINGS = {
    "factor_vae": "FactorVAE",
    "dci": "DCI",
    "mig": "MIG",
    "beta_vae": "beta-VAE",
    "psnr": "PSNR",
    "clip_accuracy": "CLIP acc.",
    "edit_accuracy": "edit acc.",
    "edit_leakage": "edit leak.",
}
_RESULTS = ("psnr", "clip_accuracy", "edit_accuracy", "edit_leakage")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")
_SEED = re.compile(r"(?:^|[-_.])s(\d+)$")


@dataclass(frozen=True)
class Row:
    """The figures of one checkpoint.

    Attributes:
        experiment: what the runs of several seeds have in common.
        run: path of the run below the folder looked at.
        seed: training seed, if known.
        step: global step of the checkpoint.
        epoch: its epoch, if its representation file still exists.
        latest: whether it is the run's latest scored checkpoint.
        figures: by the names of ``HEADINGS``.
    """

    experiment: str
    run: str
    seed: int | None
    step: int
    epoch: int | None
    latest: bool
    figures: dict[str, float]


def collect_rows(logdir: str | Path, seed: int = PROTOCOL_SEED) -> list[Row]:
    """One row for each scored checkpoint of the runs at or below ``logdir``, by run and step.

    Args:
        logdir: a run folder, or any folder above runs.
        seed: of the metrics' random generators (not of the training).

    Raises:
        UserError: no such folder.
    """
    rows = []
    for run_dir in find_runs(logdir):
        try:
            rows += _rows_of(run_dir, Path(logdir), seed)
        except UserError as err:
            logger.warning("%s is left out of the table: %s", run_dir, err)
    return rows


def _rows_of(run_dir: Path, logdir: Path, seed: int) -> list[Row]:
    scores = read_scores(run_dir, seed)
    epochs = _epochs(run_dir) if scores else {}
    experiment, training_seed = _experiment_and_seed(run_dir, logdir)
    rows = []
    for step, content in scores.items():
        latest = step == max(scores)
        figures = figures_of(content) | (_other_results(run_dir) if latest else {})
        rows.append(Row(experiment, run_dir.resolve().name, training_seed, step, epochs.get(step), latest, figures))
    return rows


def _epochs(run_dir: Path) -> dict[int, int | None]:
    """Epoch of each step, from the run's representation files."""
    epochs = {}
    for path in latent_paths(run_dir):
        with contextlib.suppress(UserError):  # a damaged file was reported by scoring; its epoch stays unknown
            latents = read_latent_file(path)
            epochs[latents.num_samples] = latents.epoch
    return epochs


def _experiment_and_seed(run_dir: Path, logdir: Path) -> tuple[str, int | None]:
    """Name without time and seed, with the folders above it, so that only runs that stand together are averaged."""
    run_dir, logdir = run_dir.resolve(), logdir.resolve()
    record = read_json(run_dir / RUN_FILE) if (run_dir / RUN_FILE).is_file() else {}
    name = _TIME.sub("", str(record.get("name") or run_dir.name))
    found = _SEED.search(name)
    seed = record.get("seed", int(found.group(1)) if found else None)
    name = _SEED.sub("", name)
    above = run_dir.parent.relative_to(logdir) if run_dir != logdir else Path()
    return (above / name).as_posix() if name else (above.name or run_dir.parent.name), seed


def _other_results(run_dir: Path) -> dict[str, float]:
    path = run_dir / RESULTS_FILE
    results = read_json(path) if path.is_file() else {}
    return {name: float(results[name]) for name in _RESULTS if isinstance(results.get(name), (int, float))}


def score_table(rows: Iterable[Row]) -> Table:
    """The latest checkpoint of every run, runs of one experiment together with their mean and spread."""
    latest = [row for row in rows if row.latest]
    shown = [name for name in HEADINGS if any(name in row.figures for row in latest)]
    table = Table(title="Latest scored checkpoint of each run")
    for heading in ("experiment", "run"):
        table.add_column(heading, overflow="fold")
    for heading in ("seed", "step", "epoch", *(HEADINGS[name] for name in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for experiment in dict.fromkeys(row.experiment for row in latest):
        runs = [row for row in latest if row.experiment == experiment]
        for row in runs:
            where = [_text(row.seed), str(row.step), _text(row.epoch)]
            cells = [f"{row.figures[name]:.3f}" if name in row.figures else "" for name in shown]
            table.add_row(experiment, row.run, *where, *cells)
        if len(runs) > 1:
            cells = [_mean_and_spread([row.figures[name] for row in runs if name in row.figures]) for name in shown]
            table.add_row(experiment, f"mean ± std of {len(runs)} runs", "", "", "", *cells, style="bold")
        table.add_section()
    return table


def _mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, as papers print them."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one line for each scored checkpoint; ``latest`` is 1 on the line of a run's latest."""
    with atomic_write(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["experiment", "run", "seed", "step", "epoch", "latest", *HEADINGS])
        for row in rows:
            figures = [row.figures.get(name, "") for name in HEADINGS]
            where = [row.experiment, row.run, _text(row.seed), row.step, _text(row.epoch), int(row.latest)]
            writer.writerow([*where, *figures])
