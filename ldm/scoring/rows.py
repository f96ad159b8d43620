"""The figures of all scored checkpoints below a folder, and what runs of several seeds have in common."""

from __future__ import annotations

import contextlib
import logging
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED
from ldm.runs.folder import RESULTS_FILE, RUN_FILE, read_json
from ldm.scoring.files import find_runs, latent_paths, read_latent_file, read_scores, scores_folder
from ldm.scoring.run import best_of, figures_of
from ldm.scoring.spaces import describe_dataset, space_of
from ldm.scoring.tasks import read_record
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

# figure -> heading; the last ones come from results.json
HEADINGS = {
    "factor_vae": "FactorVAE",
    "dci": "DCI",
    "mig": "MIG",
    "beta_vae": "beta-VAE",
    "sap": "SAP",
    "modularity_explicitness": "modularity",
    "irs": "IRS",
    "med": "MED",
    "unsupervised": "MI (low)",
    "psnr": "PSNR",
    "clip_accuracy": "CLIP acc.",
    "edit_accuracy": "edit acc.",
    "edit_leakage": "edit leak.",
}
RESULTS = ("psnr", "clip_accuracy", "edit_accuracy", "edit_leakage")
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")
_SEED = re.compile(r"(?:^|[-_.])s(\d+)$")


class Cell(NamedTuple):
    """A figure: its mean, its sample standard deviation if it is one of several, and the step it is of."""

    mean: float
    deviation: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class Row:
    """The figures of one checkpoint.

    Attributes:
        experiment: what the runs of several seeds have in common.
        run: name of the run's folder.
        run_dir: the folder.
        seed: training seed, if known.
        step: global step of the checkpoint.
        epoch: its epoch, if its representation file still exists.
        latest: whether it is the run's latest scored checkpoint.
        figures: by the names of ``HEADINGS``; means where metrics were taken with several seeds.
        deviations: over the metrics' seeds, where there are several.
        by_seed: the metrics' seed -> figures.
        dataset: name of the data set, if known (``describe_dataset``).
    """

    experiment: str
    run: str
    run_dir: Path
    seed: int | None
    step: int
    epoch: int | None
    latest: bool
    figures: dict[str, float]
    deviations: dict[str, float] = field(default_factory=dict)
    by_seed: dict[int, dict[str, float]] = field(default_factory=dict)
    dataset: str | None = None

    def cells(self) -> dict[str, Cell]:
        """Figures with their deviations."""
        return {name: Cell(value, self.deviations.get(name)) for name, value in self.figures.items()}


def collect_rows(
    logdir: str | Path, seeds: Sequence[int] = (PROTOCOL_SEED,), protocol: str = DEFAULT_PROTOCOL
) -> list[Row]:
    """One row for each scored checkpoint of the runs at or below ``logdir``, by run and step.

    Args:
        logdir: a run folder, or any folder above runs.
        seeds: of the metrics' random generators (not of the training).
        protocol: whose scores.

    Raises:
        UserError: no such folder.
    """
    rows = []
    for run_dir in find_runs(logdir):
        try:
            rows += _rows_of(run_dir, Path(logdir), seeds, protocol)
        except UserError as err:
            logger.warning("%s is left out of the table: %s", run_dir, err)
    return rows


def _rows_of(run_dir: Path, logdir: Path, seeds: Sequence[int], protocol: str) -> list[Row]:
    scores = {seed: read_scores(run_dir, seed, protocol) for seed in seeds}
    steps = sorted({step for found in scores.values() for step in found})
    if not steps:
        return []
    heads = _heads(run_dir)
    experiment, training_seed = _experiment_and_seed(run_dir, logdir)
    rows = []
    for step in steps:
        by_seed = {seed: figures_of(found[step]) for seed, found in scores.items() if step in found}
        figures, deviations = _over_seeds(list(by_seed.values()))
        figures |= _other_results(run_dir) if step == steps[-1] else {}
        target = scores_folder(run_dir, next(iter(by_seed)), protocol) / f"{step}.json"
        rows.append(
            Row(
                experiment,
                run_dir.resolve().name,
                run_dir,
                training_seed,
                step,
                heads.get(step),
                step == steps[-1],
                figures,
                deviations,
                by_seed,
                _dataset(run_dir, target),
            )
        )
    return rows


def _over_seeds(found: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample deviation of each figure."""
    names = dict.fromkeys(name for figures in found for name in figures)
    values = {name: [figures[name] for figures in found if name in figures] for name in names}
    means = {name: statistics.fmean(numbers) for name, numbers in values.items()}
    return means, {name: statistics.stdev(numbers) for name, numbers in values.items() if len(numbers) > 1}


def _heads(run_dir: Path) -> dict[int, int | None]:
    """Epoch of each step, from the run's representation files."""
    epochs = {}
    for path in latent_paths(run_dir):
        with contextlib.suppress(UserError, ConfigError):  # a damaged file was reported by scoring
            latents = read_latent_file(path)
            epochs[latents.num_samples] = latents.epoch
    return epochs


def _dataset(run_dir: Path, target: Path) -> str | None:
    """What the record says, or else the run's config."""
    for entry in read_record(target).values():
        return (entry.get("dataset") or {}).get("name")
    with contextlib.suppress(UserError, ConfigError):
        for path in latent_paths(run_dir):
            return describe_dataset(run_dir, space_of(read_latent_file(path)))["name"]
    return None


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
    return {name: float(results[name]) for name in RESULTS if isinstance(results.get(name), (int, float))}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        experiment: its experiment.
        what: name of a run, or of how many the mean is.
        which: "last" or "best" checkpoint.
        seed: training seed, as text.
        step: of the checkpoint, as text; empty where each figure has its own.
        epoch: likewise.
        cells: figure -> value.
        is_mean: whether it is over several runs.
    """

    experiment: str
    what: str
    which: str
    seed: str
    step: str
    epoch: str
    cells: dict[str, Cell]
    is_mean: bool = False


def table_lines(rows: Iterable[Row]) -> list[Line]:
    """For every run its last checkpoint and, figure by figure, its best; for runs of one experiment their mean too.

    The best is chosen by the very score that is shown, which flatters it; both are told.
    """
    rows = list(rows)
    lines = []
    for experiment in dict.fromkeys(row.experiment for row in rows):
        runs = _by_run(row for row in rows if row.experiment == experiment)
        last = [checkpoints[-1].cells() for checkpoints in runs]
        best = [_best_cells(checkpoints) for checkpoints in runs]
        has_best = any(len(checkpoints) > 1 for checkpoints in runs)
        for checkpoints, last_cells, best_cells in zip(runs, last, best):
            row = checkpoints[-1]
            lines.append(
                Line(experiment, row.run, "last", _text(row.seed), str(row.step), _text(row.epoch), last_cells)
            )
            if has_best:
                lines.append(Line(experiment, row.run, "best", _text(row.seed), "", "", best_cells))
        if len(runs) > 1:
            what = f"mean ± std of {len(runs)} runs"
            lines.append(Line(experiment, what, "last", "", "", "", _mean_cells(last), is_mean=True))
            if has_best:
                lines.append(Line(experiment, what, "best", "", "", "", _mean_cells(best), is_mean=True))
    return lines


def _by_run(rows: Iterable[Row]) -> list[list[Row]]:
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(row.run_dir, []).append(row)
    return [sorted(found, key=lambda row: row.step) for found in runs.values()]


def _best_cells(checkpoints: Sequence[Row]) -> dict[str, Cell]:
    """Each figure where it is best, with its step; figures of ``results.json`` have no steps and are left out."""
    scored = {
        row.step: {name: value for name, value in row.figures.items() if name not in RESULTS} for row in checkpoints
    }
    by_step = {row.step: row for row in checkpoints}
    return {
        name: Cell(value, by_step[step].deviations.get(name), step) for name, (step, value) in best_of(scored).items()
    }


def _mean_cells(found: Sequence[Mapping[str, Cell]]) -> dict[str, Cell]:
    means, deviations = _over_seeds([{name: cell.mean for name, cell in cells.items()} for cells in found])
    return {name: Cell(mean, deviations.get(name)) for name, mean in means.items()}


def shown_figures(lines: Iterable[Line]) -> list[str]:
    """The figures that at least one line holds, in the order of ``HEADINGS``."""
    found = {name for line in lines for name in line.cells}
    return [name for name in HEADINGS if name in found]


def _text(value: int | None) -> str:
    return "" if value is None else str(value)
