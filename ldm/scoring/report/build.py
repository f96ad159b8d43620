"""Reports to open in a browser: one of a run, one that compares runs, one of a file of latents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOLS
from ldm.runs.folder import RUN_FILE, read_json
from ldm.scoring.files import latent_paths, read_latent_file, scores_folder
from ldm.scoring.published import published_beside
from ldm.scoring.report import page as html
from ldm.scoring.report.pictures import Picture, run_pictures
from ldm.scoring.report.svg import NUM_COLOURS, Series, curves, heat_map, strip
from ldm.scoring.rows import HEADINGS, RESULTS, Cell, Row, shown_figures, table_lines
from ldm.scoring.table import cell_text, source_texts
from ldm.scoring.tasks import INFORMATION_NAME, read_record, read_record_file
from ldm.util import ConfigError, UserError, atomic_write

REPORT_FILE = "report.html"
MAX_UNITS_SHOWN = 80  # columns of a heat map
MAX_COMPARED = 12  # runs whose heat maps and picture stand in a comparison
_BEST_NOTE = "Best is chosen among the checkpoints by the very score that is shown, which flatters it."


def write_reports(logdir: str | Path, rows: Sequence[Row], protocol: str = DEFAULT_PROTOCOL) -> list[Path]:
    """A report into the folder of each run and, where there are several, one that compares them into ``logdir``.

    Args:
        logdir: the folder the rows were collected from.
        rows: of ``collect_rows``.
        protocol: whose scores they are.

    Returns:
        The files written.
    """
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        runs.setdefault(row.run_dir, []).append(row)
    written = [_write(run_dir / REPORT_FILE, _run_page(found, protocol)) for run_dir, found in runs.items()]
    if len(runs) > 1:
        written.append(_write(Path(logdir) / REPORT_FILE, _comparison_page(list(runs.values()), protocol)))
    return written


def write_latents_report(row: Row, record: Path, target: Path) -> Path:
    """A report beside the score file of a file of latents.

    Args:
        row: its figures.
        record: the record behind them.
        target: the score file.
    """
    parts = read_record_file(record)
    sections = [
        html.section("Scores", _score_table([row]), *_published_notes([row])),
        html.section("Units and factors", _heat_maps(parts, ())),
        html.section("Seeds of the metrics", _seed_strips(row)),
        html.section("How it was scored", html.pairs(_scoring_facts(parts))),
    ]
    return _write(target.with_suffix(".html"), html.page(row.run, _dataset_text(parts, row), sections))


def _write(path: Path, text: str) -> Path:
    with atomic_write(path) as stream:
        stream.write(text)
    return path


def _run_page(rows: Sequence[Row], protocol: str) -> str:
    """The report of one run."""
    rows = sorted(rows, key=lambda row: row.step)
    run_dir, last = rows[-1].run_dir, rows[-1]
    parts = read_record(scores_folder(run_dir, next(iter(last.by_seed)), protocol) / f"{last.step}.json")
    record = _run_record(run_dir)
    sections = [
        html.section("Scores", _score_table(rows), html.paragraph(_BEST_NOTE, soft=True), *_published_notes(rows)),
        html.section("Units and factors", _heat_maps(parts, _unit_names(run_dir, last.step))),
        html.section("Scores over checkpoints", _run_curves(rows)),
        html.section("Seeds of the metrics", _seed_strips(last)),
        html.section("Pictures", html.pictures(run_pictures(run_dir))),
        html.section(
            "How it was scored", html.paragraph(PROTOCOLS[protocol].summary), html.pairs(_scoring_facts(parts))
        ),
        html.section("How it was trained", html.pairs(_training_facts(record)), _config(run_dir)),
    ]
    return html.page(last.run, _dataset_text(parts, last), sections)


def _run_record(run_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        return read_json(run_dir / RUN_FILE)
    return {}


def _unit_names(run_dir: Path, step: int) -> tuple[str, ...]:
    """What the units of a checkpoint stand for, where its representation says so."""
    for path in latent_paths(run_dir):
        with contextlib.suppress(UserError, ConfigError):
            latents = read_latent_file(path)
            if latents.num_samples == step:
                return latents.unit_names or ()
    return ()


def _dataset_text(parts: Mapping[str, Mapping[str, Any]], row: Row) -> str:
    """Data set, its variant and its factors in a line."""
    dataset = next((entry["dataset"] for entry in parts.values() if entry.get("dataset")), {})
    words = [str(dataset.get("name") or row.dataset or "unnamed data set")]
    words += [f"{key} {value}" for key, value in dataset.get("variant", {}).items()]
    if dataset.get("factors"):
        words.append(" x ".join(f"{name} {size}" for name, size in dataset["factors"].items()))
    return ", ".join(words)


def _score_table(rows: Sequence[Row]) -> str:
    """Last and best of each run, means, and published figures."""
    lines = table_lines(rows)
    shown = shown_figures(lines)
    headings = ["experiment", "run", "checkpoint", "step", *(HEADINGS[name] for name in shown)]
    body = [
        (
            [
                line.experiment,
                line.what,
                line.which,
                line.step,
                *(_tied(cell_text(line.cells.get(name))) for name in shown),
            ],
            "mean" if line.is_mean else "",
        )
        for line in lines
    ]
    for row in published_beside([row.dataset for row in rows], shown):
        cells = [_tied(cell_text(Cell(*row.figures[name]))) if name in row.figures else "" for name in shown]
        body.append(([f"published, {row.dataset}", f"{row.method} [{row.source}]", "", "", *cells], "other"))
    return html.table(headings, body, num_words=3)


def _tied(text: str) -> str:
    """Keep deviation and step in one piece where a cell is broken into lines."""
    return text.replace("± ", "±\N{NO-BREAK SPACE}").replace("@ ", "@\N{NO-BREAK SPACE}")


def _published_notes(rows: Sequence[Row]) -> list[str]:
    """Where published figures were read."""
    found = published_beside([row.dataset for row in rows], shown_figures(table_lines(rows)))
    return [html.paragraph(text, soft=True) for text in source_texts(dict.fromkeys(row.source for row in found))]


def _heat_maps(parts: Mapping[str, Mapping[str, Any]], unit_names: Sequence[str]) -> str:
    """Importance of units for factors (DCI's trees), and what they tell of them (mutual information)."""
    factors = next((list(entry["factors"]) for entry in parts.values() if entry.get("factors")), [])
    found = []
    importances = [parts.get(f"dci/{number}", {}).get("result", {}).get("importance") for number in range(len(factors))]
    if importances and all(importances):
        values, names = _strongest(np.array(importances, dtype=float), unit_names)
        found.append(
            html.card(
                "Importance of each unit for each factor",
                heat_map(values, factors, names, "DCI importances"),
                "Share of the boosted trees' splits (DCI): rows sum to 1. Disentangled: one strong cell in every "
                "column; complete: one in every row.",
            )
        )
    told = parts.get(INFORMATION_NAME, {}).get("result")
    if told:
        information = np.array(told["mutual_information"], dtype=float).T  # (F, K)
        entropies = np.maximum(np.array(told["entropies"], dtype=float)[:, None], 1e-12)
        shares, names = _strongest(information / entropies, unit_names)
        found.append(
            html.card(
                "What each unit tells of each factor",
                heat_map(shares, factors, names, "mutual information"),
                "Mutual information of the unit (20 bins) and the factor, as a share of the factor's entropy. MIG is "
                "the mean gap between the two largest cells of a row.",
            )
        )
    return html.cards(found)


def _strongest(values: np.ndarray, unit_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Values (F, K) and names of the units, counted from 1 as in all pictures; of very many only the strongest."""
    count = values.shape[1]
    kept = np.sort(np.argsort(-values.max(axis=0), kind="stable")[:MAX_UNITS_SHOWN])
    named = len(unit_names) == count
    return values[:, kept], [f"{unit + 1} {unit_names[unit] if named else ''}".strip() for unit in kept]


def _run_curves(rows: Sequence[Row]) -> str:
    """Each score over the run's checkpoints, seeds of the metrics as points; nothing for a single checkpoint."""
    if len(rows) < 2:
        return ""
    charts = []
    for name in _scores(rows):
        points = [(row.step, row.figures[name]) for row in rows if name in row.figures]
        scatter = [
            (row.step, found[name])
            for row in rows
            if len(row.by_seed) > 1
            for found in row.by_seed.values()
            if name in found
        ]
        charts.append(html.card(HEADINGS[name], curves([Series(HEADINGS[name], points, scatter)], HEADINGS[name])))
    return html.cards(charts)


def _scores(rows: Iterable[Row]) -> list[str]:
    """Figures of score files that at least one row holds."""
    found = {name for row in rows for name in row.figures}
    return [name for name in HEADINGS if name in found and name not in RESULTS]


def _seed_strips(row: Row) -> str:
    """The scores of one checkpoint, every seed of the metrics a point."""
    if len(row.by_seed) < 2:
        return ""
    groups = [
        (HEADINGS[name], [(f"seed {seed}", found[name]) for seed, found in row.by_seed.items() if name in found])
        for name in _scores([row])
    ]
    return html.cards([html.card("Last checkpoint", strip(groups, "scores by seed of the metrics"))])


def _scoring_facts(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Protocol, seed, arguments and versions behind the scores."""
    facts: dict[str, Any] = {}
    for name, entry in parts.items():
        metric = name.split("/")[0]
        if metric == INFORMATION_NAME:
            continue
        facts |= {"protocol": entry.get("protocol"), "seed": entry.get("seed")}
        facts[metric] = ", ".join(f"{key} {value}" for key, value in entry.get("arguments", {}).items())
        facts |= {f"version of {key}": value for key, value in entry.get("versions", {}).items()}
    return dict(sorted(facts.items(), key=lambda fact: fact[0].startswith("version of ")))


def _training_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says."""
    facts = {
        name: record[name]
        for name in ("seed", "status", "started", "seconds", "global_step", "learning_rate")
        if name in record
    }
    facts |= {f"version of {key}": value for key, value in record.get("versions", {}).items()}
    if record.get("git"):
        dirty = " (with changes)" if record["git"].get("dirty") else ""
        facts["source"] = f"{record['git'].get('revision', '')}{dirty}"
    if record.get("command"):
        facts["command"] = " ".join(map(str, record["command"]))
    return facts


def _config(run_dir: Path) -> str:
    """The newest saved config, folded."""
    paths = sorted((run_dir / "configs").glob("*-project.yaml"))
    return html.folded(f"config: {paths[-1].name}", paths[-1].read_text(encoding="utf-8")) if paths else ""


def _comparison_page(runs: Sequence[Sequence[Row]], protocol: str) -> str:
    """The report of several runs."""
    rows = [row for found in runs for row in found]
    sections = [
        html.section("Scores", _score_table(rows), html.paragraph(_BEST_NOTE, soft=True), *_published_notes(rows)),
        html.section("Last checkpoints, runs as points", _run_strips(runs)),
        html.section("Scores over checkpoints", _compared_curves(runs)),
        html.section("Units and factors", *(_named_heat_maps(found[-1], protocol) for found in runs[:MAX_COMPARED])),
        html.section("Pictures", html.pictures(_compared_pictures(runs))),
    ]
    names = dict.fromkeys(row.dataset or "unnamed data set" for row in rows)
    return html.page(f"{len(runs)} runs", ", ".join(names), sections)


def _run_strips(runs: Sequence[Sequence[Row]]) -> str:
    """For each score the runs' last checkpoints by experiment."""
    last = [max(found, key=lambda row: row.step) for found in runs]
    charts = []
    for name in _scores(last):
        groups = [
            (
                experiment,
                [(row.run, row.figures[name]) for row in last if row.experiment == experiment and name in row.figures],
            )
            for experiment in dict.fromkeys(row.experiment for row in last)
        ]
        charts.append(html.card(HEADINGS[name], strip([group for group in groups if group[1]], HEADINGS[name])))
    return html.cards(charts)


def _compared_curves(runs: Sequence[Sequence[Row]]) -> str:
    """For each score a line per run."""
    many = [sorted(found, key=lambda row: row.step) for found in runs]
    if all(len(found) < 2 for found in many):
        return ""
    charts = []
    for name in _scores(row for found in many for row in found):
        lines = [
            Series(found[-1].run, [(row.step, row.figures[name]) for row in found if name in row.figures], (), number)
            for number, found in enumerate(many)
        ]
        charts.append(html.card(HEADINGS[name], curves([line for line in lines if line.points], HEADINGS[name])))
    note = html.paragraph(f"Colours repeat after {NUM_COLOURS} runs.", soft=True) if len(many) > NUM_COLOURS else ""
    return html.legend([found[-1].run for found in many]) + note + html.cards(charts)


def _named_heat_maps(row: Row, protocol: str) -> str:
    target = scores_folder(row.run_dir, next(iter(row.by_seed)), protocol) / f"{row.step}.json"
    maps = _heat_maps(read_record(target), _unit_names(row.run_dir, row.step))
    return html.paragraph(f"{row.run}, step {row.step}") + maps if maps else ""


def _compared_pictures(runs: Sequence[Sequence[Row]]) -> list[Picture]:
    """The most telling picture of each run."""
    found = []
    for rows in runs[:MAX_COMPARED]:
        for picture in run_pictures(rows[-1].run_dir, limit=1, max_side=520):
            title = f"{rows[-1].run}: {picture.title}"
            found.append(Picture(title, picture.data, picture.width, picture.height))
    return found
