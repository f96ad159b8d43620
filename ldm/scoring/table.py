"""Table of scores over runs and seeds beside published figures: on the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import contextlib
import csv
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOL_SEED
from ldm.metrics.registry import ALL_METRICS
from ldm.runs.records import RESULTS_FILE, RUN_FILE, read_json
from ldm.scoring import files
from ldm.scoring.factors import describe_dataset, space_of
from ldm.scoring.published import published_beside, published_sources
from ldm.scoring.text_table import TextTable, fitting
from ldm.util import ConfigError, UserError, atomic_write, csv_cell

logger = logging.getLogger(__name__)

# figures of results.json that are not scores of a representation, with their headings
RESULTS = {"psnr": "PSNR", "clip_accuracy": "CLIP acc.", "edit_accuracy": "edit acc.", "edit_leakage": "edit leak."}
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")
_SEED = re.compile(r"(?:^|[-_.])s(\d+)$")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX_SPECIAL = str.maketrans(_LATEX | {letter: f"\\{letter}" for letter in "&%$#_{}"})


def columns() -> dict[str, str]:
    """Return all figures that a table can show, in order, with their headings; registered metrics are included."""
    metrics = sorted(ALL_METRICS.items(), key=lambda entry: entry[1].column)
    return {name: metric.heading for name, metric in metrics} | RESULTS


class Cell(NamedTuple):
    """A figure: its mean, its sample standard deviation if it is one of several, and its step if it has its own."""

    mean: float
    deviation: float | None = None
    step: int | None = None

    def __str__(self) -> str:
        text = f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"
        return text if self.step is None else f"{text} @ {self.step}"


@dataclass(frozen=True)
class Row:
    """Figures of one checkpoint."""

    experiment: str  # name that the runs of several training seeds share
    run: str  # name of the run's folder
    run_dir: Path
    seed: int | None  # training seed, if known
    step: int  # global step of the checkpoint
    epoch: int | None  # of the checkpoint, if its representation file still exists
    latest: bool  # whether it is the run's latest scored checkpoint
    figures: dict[str, float]  # by the names of ``columns``; means if metrics were computed with several seeds
    deviations: dict[str, float] = field(default_factory=dict)  # over the metrics' seeds, if there are several
    by_seed: dict[int, dict[str, float]] = field(default_factory=dict)  # seed of the metrics -> figures
    dataset: str | None = None  # name of the data set, if known
    record: Path | None = None  # record of its scores, of the first seed
    standardized: bool = False  # whether each unit was divided by its standard deviation

    def cells(self) -> dict[str, Cell]:
        """Return the figures with their deviations."""
        return {name: Cell(value, self.deviations.get(name)) for name, value in self.figures.items()}


def collect_rows(
    logdir: str | Path,
    seeds: Sequence[int] = (PROTOCOL_SEED,),
    protocol: str = DEFAULT_PROTOCOL,
    standardized: bool = False,
) -> list[Row]:
    """Return a row for each scored checkpoint of the runs at or below a folder, by run and step.

    Args:
        logdir: a run folder, or any folder above runs.
        seeds: seeds of the metrics' random generators (not of training).
        protocol: name of the protocol of the scores.
        standardized: whether the scores are those of standardized units.

    Raises:
        UserError: the folder does not exist.
    """
    rows = []
    for run_dir in files.find_runs(logdir):
        try:
            rows += _rows_of(run_dir, Path(logdir), seeds, (protocol, standardized))
        except UserError as error:
            logger.warning("%s: left out of the table. %s", run_dir, error)
    return rows


def _rows_of(run_dir: Path, logdir: Path, seeds: Sequence[int], kind: tuple[str, bool]) -> list[Row]:
    scores = {seed: files.read_scores(run_dir, seed, *kind) for seed in seeds}
    steps = sorted({step for found in scores.values() for step in found})
    if not steps:
        return []
    epochs, dataset = _epochs_and_dataset(run_dir)
    experiment, training_seed = _experiment_and_seed(run_dir, logdir)
    name, rows = run_dir.resolve().name, []
    for step in steps:
        by_seed = {seed: files.figures_of(found[step]) for seed, found in scores.items() if step in found}
        figures, deviations = files.over_seeds(list(by_seed.values()))
        figures |= _other_results(run_dir) if step == steps[-1] else {}
        record = files.record_file(files.score_file(run_dir, step, next(iter(by_seed)), *kind))
        tasks = files.read_record(record).values()
        about = next((entry["dataset"] for entry in tasks if entry.get("dataset")), {"name": dataset})
        where = (experiment, name, run_dir, training_seed, step, epochs.get(step), step == steps[-1])
        rows.append(Row(*where, figures, deviations, by_seed, about.get("name"), record, kind[1]))
    return rows


def _epochs_and_dataset(run_dir: Path) -> tuple[dict[int, int | None], str | None]:
    """Return the epoch of each step, and the name of the data set, from a run's representation files and config."""
    epochs: dict[int, int | None] = {}
    dataset = None
    for path in files.latent_paths(run_dir):
        with contextlib.suppress(UserError, ConfigError):  # damaged files are reported when they are scored
            latents = files.read_latent_file(path)
            epochs[latents.num_samples] = latents.epoch
            dataset = dataset or describe_dataset(run_dir, space_of(latents))["name"]
    return epochs, dataset


def without_time(run: str) -> str:
    """Return the name of a run without the time at its beginning."""
    return _TIME.sub("", run)


def _experiment_and_seed(run_dir: Path, logdir: Path) -> tuple[str, int | None]:
    """Return the run's name without time and seed, with the folders above it so that only siblings are averaged."""
    run_dir, logdir = run_dir.resolve(), logdir.resolve()
    record = read_json(run_dir / RUN_FILE) if (run_dir / RUN_FILE).is_file() else {}
    name = without_time(str(record.get("name") or run_dir.name))
    found = _SEED.search(name)
    seed = record.get("seed", int(found.group(1)) if found else None)
    name = _SEED.sub("", name)
    above = run_dir.parent.relative_to(logdir) if run_dir != logdir else Path()
    return (above / name).as_posix() if name else (above.name or run_dir.parent.name), seed


def _other_results(run_dir: Path) -> dict[str, float]:
    path = run_dir / RESULTS_FILE
    results = read_json(path) if path.is_file() else {}
    return {name: float(results[name]) for name in RESULTS if isinstance(results.get(name), (int, float))}


def latents_row(
    latents: str | Path, target: Path, seeds: Sequence[int], dataset: str | None, standardized: bool = False
) -> list[Row]:
    """Return the row of a file of latents; empty if it has no scores.

    Args:
        latents: the file.
        target: its score file.
        seeds: seeds of the metrics.
        dataset: name of its data set, if known.
        standardized: whether each unit was divided by its standard deviation.
    """
    if not target.is_file():
        return []
    content = files.read_score_file(target)
    found = content.get(files.SEEDS_KEY, {seeds[0]: content})
    by_seed = {int(seed): files.figures_of(scores) for seed, scores in found.items()}
    deviations = files.figures_of(content.get(files.DEVIATION_KEY, {}))
    where = (Path(latents).stem, Path(latents).name, target.parent, None, 0, None, True)
    return [Row(*where, files.figures_of(content), deviations, by_seed, dataset, standardized=standardized)]


@dataclass(frozen=True)
class TableLine:
    """A line of the table, as text; ``step`` is empty if each figure has its own."""

    experiment: str
    run: str  # name of a run, or the number of runs a mean is of
    checkpoint: str  # "last" or "best"
    seed: str
    step: str
    epoch: str
    cells: dict[str, Cell]
    kind: str = "run"  # or "mean", "published"

    @property
    def section(self) -> str:
        """Lines with equal sections are grouped."""
        return "published" if self.kind == "published" else self.experiment


class TableContent(NamedTuple):
    """Lines of a table, the figures that its columns show, and notes to print below it."""

    lines: list[TableLine]
    figures: list[str]
    notes: list[str]

    def texts(self, line: TableLine) -> list[str]:
        """Return the figures of a line as papers print them: "0.893", "0.893 ± 0.021", "0.912 @ 2000" (step)."""
        return [str(line.cells.get(name, "")) for name in self.figures]


def by_experiment(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by experiment; runs of an experiment that use different data sets are separate groups."""
    rows = list(rows)
    shared = Counter(experiment for experiment, _ in {(row.experiment, row.dataset) for row in rows})
    groups: dict[str, list[Row]] = {}
    for row in rows:
        dataset = f" ({row.dataset or 'unnamed data set'})" if shared[row.experiment] > 1 else ""
        groups.setdefault(row.experiment + dataset, []).append(row)
    return groups


def table_content(rows: Iterable[Row]) -> TableContent:
    """Return the last and the best checkpoint of every run, means over the runs of an experiment, published figures.

    The best checkpoint is selected for each figure by that figure itself, which is optimistic; so the last one is shown
    too.
    """
    rows = list(rows)
    lines = [line for experiment, group in by_experiment(rows).items() for line in _experiment_lines(experiment, group)]
    figures = [name for name in columns() if any(name in line.cells for line in lines)]
    published = published_beside([row.dataset for row in rows], figures)
    for row in published:
        cells = {name: Cell(*value) for name, value in row.figures.items()}
        where = (f"published, {row.dataset}", f"{row.method} [{row.source}]", "", "", "", "")
        lines.append(TableLine(*where, cells, "published"))
    seeds = max((len(row.by_seed) for row in rows), default=1)
    notes = ["Units are divided by their standard deviation (--standardize)."] if rows and rows[0].standardized else []
    notes += [f"± in the line of a run: over {seeds} seeds of the metrics' random draws"] if seeds > 1 else []
    others = sorted({row.dataset for row in rows if row.dataset} - {row.dataset for row in published})
    if published and others:
        notes.append(f"The runs use {', '.join(others)}: published figures are of other images.")
    sources = published_sources()
    notes += [f"[{key}] {sources[key]}" for key in dict.fromkeys(row.source for row in published)]
    return TableContent(lines, figures, notes)


def _experiment_lines(experiment: str, rows: Iterable[Row]) -> list[TableLine]:
    """Return the lines of runs that differ in their training seed."""
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(row.run_dir, []).append(row)
    lines = []
    for checkpoints in runs.values():
        row = max(checkpoints, key=lambda row: row.step)
        seed, epoch = ("" if value is None else str(value) for value in (row.seed, row.epoch))
        lines.append(TableLine(experiment, row.run, "last", seed, str(row.step), epoch, row.cells()))
        if any(len(found) > 1 for found in runs.values()):
            lines.append(TableLine(experiment, row.run, "best", seed, "", "", _best_cells(checkpoints)))
    for checkpoint in ("last", "best") if len(runs) > 1 else ():
        chosen = [line.cells.items() for line in lines if line.checkpoint == checkpoint]
        if chosen:
            means, deviations = files.over_seeds([{name: cell.mean for name, cell in cells} for cells in chosen])
            cells = {name: Cell(mean, deviations.get(name)) for name, mean in means.items()}
            lines.append(
                TableLine(experiment, f"mean ± std of {len(runs)} runs", checkpoint, "", "", "", cells, "mean")
            )
    return lines


def _best_cells(checkpoints: Sequence[Row]) -> dict[str, Cell]:
    """Return the best value of each score with its step."""
    by_step = {row.step: row for row in checkpoints}
    best = files.best_of({step: _scores(row) for step, row in by_step.items()})
    return {name: Cell(value, by_step[step].deviations.get(name), step) for name, (step, value) in best.items()}


def _scores(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.figures.items() if name not in RESULTS}


def score_tables(rows: Iterable[Row], width: int) -> list[Table]:
    """Return the table, divided into several tables of fewer figures so that each fits ``width`` characters."""
    content = table_content(rows)
    return fitting(content.figures, lambda shown: _terminal_table(content._replace(figures=shown)), width)


def _terminal_table(content: TableContent) -> Table:
    title = "Scored checkpoints: last, and best of each score (value @ step)"
    table = Table(title=title, caption=escape("\n".join(content.notes)) or None, caption_justify="left")
    for heading in ("experiment", "run"):
        table.add_column(heading, overflow="fold")
    for heading in ("", "seed", "step", "epoch", *map(columns().get, content.figures)):
        table.add_column(heading, justify="right", no_wrap=True)
    styles, above = {"run": "", "mean": "bold", "published": "dim"}, None
    for line in content.lines:
        if above not in (None, line.section):
            table.add_section()
        where = (line.experiment, line.run, line.checkpoint, line.seed, line.step, line.epoch)
        table.add_row(*map(escape, where), *content.texts(line), style=styles[line.kind])
        above = line.section
    return table


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a line for each scored checkpoint, with mean and deviation over the metrics' seeds, then published figures.

    ``kind`` is "run" or "published"; ``latest`` is 1 for a run's latest checkpoint; ``best`` lists the figures whose
    best value in the run is on the line; ``scoring_seeds`` counts the metrics' seeds.
    """
    rows = list(rows)
    with atomic_write(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        about = "kind experiment run seed step epoch latest best dataset scoring_seeds".split()
        names = list(columns())
        writer.writerow([*about, *names, *(f"{name}_std" for name in names)])
        scores: dict[Path, dict[int, dict[str, float]]] = {}
        for row in rows:
            scores.setdefault(row.run_dir, {})[row.step] = _scores(row)
        best = {run_dir: files.best_of(by_step) for run_dir, by_step in scores.items()}
        for row in rows:
            marks = [name for name, (step, _) in best[row.run_dir].items() if step == row.step]
            where = ["run", row.experiment, row.run, row.seed, row.step, row.epoch, int(row.latest), " ".join(marks)]
            values = [*map(row.figures.get, names), *map(row.deviations.get, names)]
            writer.writerow(map(csv_cell, [*where, row.dataset, len(row.by_seed), *values]))
        figures = {name for row in rows for name in row.figures}
        for found in published_beside([row.dataset for row in rows], figures):
            cells = [found.figures.get(name, (None, None)) for name in names]
            where = ["published", found.method, found.source, "", "", "", "", "", found.dataset, ""]
            figures_of_row = [*(mean for mean, _ in cells), *(deviation for _, deviation in cells)]
            writer.writerow(map(csv_cell, [*where, *figures_of_row]))


def _score_text(rows: Iterable[Row]) -> TextTable:
    content = table_content(rows)
    headings = ["experiment", "run", "checkpoint", *map(columns().get, content.figures)]
    lines = [
        (line.section, [line.experiment, line.run, line.checkpoint, *content.texts(line)]) for line in content.lines
    ]
    return TextTable("", headings, lines, content.notes, 3)


def write_markdown(path: str | Path, rows: Iterable[Row], further: Sequence[TextTable] = ()) -> None:
    """Write the table as Markdown, with the notes below it, then further tables."""

    def text(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    with atomic_write(path) as stream:
        for table in (_score_text(rows), *further):
            stream.write(f"\n{table.title}\n\n" if table.title else "")
            marks = ["---"] * table.num_words + ["---:"] * (len(table.headings) - table.num_words)
            stream.write(text(table.headings) + text(marks))
            stream.writelines(text(cells) for _, cells in table.rows)
            stream.writelines(f"\n{note}\n" for note in table.notes)


def write_latex(path: str | Path, rows: Iterable[Row], further: Sequence[TextTable] = ()) -> None:
    """Write the table as LaTeX (package booktabs), with the notes as comments, then further tables."""

    def text(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(_LATEX_SPECIAL) for cell in cells) + " \\\\\n"

    with atomic_write(path) as stream:
        for table in (_score_text(rows), *further):
            stream.writelines(f"% {note}\n" for note in ([table.title] if table.title else []) + table.notes)
            columns_text = "l" * table.num_words + "r" * (len(table.headings) - table.num_words)
            stream.write(f"\\begin{{tabular}}{{{columns_text}}}\n\\toprule\n" + text(table.headings))
            above = None
            for section, cells in table.rows:
                stream.write("\\midrule\n" if section != above else "")
                stream.write(text(cells))
                above = section
            stream.write("\\bottomrule\n\\end{tabular}\n")
