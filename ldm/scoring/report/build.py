"""HTML reports: one per run, one that compares runs, one for a file of latents."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.metrics import DEFAULT_PROTOCOL, PROTOCOLS
from ldm.runs.records import RUN_FILE, read_json
from ldm.scoring.files import latent_paths, read_latent_file, read_record
from ldm.scoring.plan import INFORMATION
from ldm.scoring.report import page as html
from ldm.scoring.report.pictures import Picture, run_pictures
from ldm.scoring.report.svg import NUM_COLOURS, Series, curves, heat_map, strip
from ldm.scoring.report.trust import trust_section
from ldm.scoring.table import RESULTS, Row, by_experiment, columns, table_content
from ldm.scoring.trust import Trust
from ldm.util import ConfigError, UserError, atomic_write

REPORT_FILE = "report.html"
MAX_UNITS_SHOWN = 80  # columns of a heat map
MAX_COMPARED = 12  # runs whose heat maps and picture are part of a comparison
_BEST_NOTE = "Each best checkpoint is selected by the score that is shown, which is optimistic."
_IMPORTANCE_NOTE = (
    "Share of the boosted trees' splits (DCI): rows sum to 1. Disentangled: one strong cell in every column; complete: "
    "one in every row."
)
_INFORMATION_NOTE = (
    "Mutual information of the unit (20 bins) and the factor, as a share of the factor's entropy. MIG is the mean gap "
    "between the two largest cells of a row."
)

Record = Mapping[str, Mapping[str, Any]]  # results of tasks, as in ``read_record``


def write_reports(
    logdir: str | Path, rows: Sequence[Row], protocol: str = DEFAULT_PROTOCOL, trusts: Sequence[Trust] = ()
) -> list[Path]:
    """Write a report to the folder of each run and, if there are several runs, a comparison to ``logdir``.

    Args:
        logdir: the folder the rows were collected from.
        rows: rows of ``collect_rows``.
        protocol: name of the protocol of the scores.
        trusts: replicates and variants of the latest scores.

    Returns:
        The files written.
    """
    runs: dict[Path, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.step):
        runs.setdefault(row.run_dir, []).append(row)
    runs = dict(sorted(runs.items()))
    written = []
    for run_dir, found in runs.items():
        section = trust_section([trust for trust in trusts if trust.row.run_dir == run_dir], protocol)
        written.append(_write(run_dir / REPORT_FILE, _run_page(found, protocol, section)))
    if len(runs) > 1:
        page = _comparison_page(list(runs.values()), protocol, trust_section(trusts, protocol))
        written.append(_write(Path(logdir) / REPORT_FILE, page))
    return written


def write_latents_report(row: Row, record: Path, target: Path, trusts: Sequence[Trust] = ()) -> Path:
    """Write a report beside the score file of a file of latents.

    Args:
        row: its figures.
        record: its record.
        target: the score file.
        trusts: replicates and variants of its scores.
    """
    tasks = read_record(record)
    protocol = next((entry["protocol"] for entry in tasks.values()), DEFAULT_PROTOCOL)
    sections = [
        html.section("Scores", _score_table([row])),
        trust_section(trusts, protocol),
        html.section("Units and factors", _heat_maps(tasks, ())),
        html.section("Seeds of the metrics", _seed_strips(row)),
        html.section("Settings of scoring", html.pairs(_scoring_facts(tasks))),
    ]
    return _write(target.with_suffix(".html"), html.page(row.run, _dataset_text(tasks, row), sections))


def _write(path: Path, text: str) -> Path:
    with atomic_write(path) as stream:
        stream.write(text)
    return path


def _run_page(rows: Sequence[Row], protocol: str, trust: str) -> str:
    last = rows[-1]
    tasks = read_record(last.record)
    training = _training_facts(last.run_dir)
    sections = [
        html.section("Scores", _score_table(rows), html.paragraph(_BEST_NOTE, soft=True)),
        trust,
        html.section("Units and factors", _heat_maps(tasks, _unit_names(last))),
        html.section("Scores over checkpoints", _curves([rows])),
        html.section("Seeds of the metrics", _seed_strips(last)),
        html.section("Pictures", html.pictures(run_pictures(last.run_dir))),
        html.section(
            "Settings of scoring", html.paragraph(PROTOCOLS[protocol].summary), html.pairs(_scoring_facts(tasks))
        ),
        html.section("Settings of training", html.pairs(training), _config(last.run_dir)),
    ]
    return html.page(last.run, _dataset_text(tasks, last), sections)


def _comparison_page(runs: Sequence[Sequence[Row]], protocol: str, trust: str) -> str:
    rows = [row for found in runs for row in found]
    last = [found[-1] for found in runs]
    maps, pictures = "", []
    for row in last[:MAX_COMPARED]:
        found = _heat_maps(read_record(row.record), _unit_names(row))
        maps += html.paragraph(f"{row.run}, step {row.step}") + found if found else ""
        for picture in run_pictures(row.run_dir, limit=1, max_side=520):
            pictures.append(Picture(f"{row.run}: {picture.title}", picture.data, picture.width, picture.height))
    sections = [
        html.section("Scores", _score_table(rows), html.paragraph(_BEST_NOTE, soft=True)),
        trust,
        html.section("Last checkpoints, one point per run", _run_strips(last)),
        html.section("Scores over checkpoints", _curves(runs)),
        html.section("Units and factors", maps),
        html.section("Pictures", html.pictures(pictures)),
    ]
    names = dict.fromkeys(row.dataset or "unnamed data set" for row in rows)
    return html.page(f"{len(runs)} runs", ", ".join(names), sections)


def _unit_names(row: Row) -> tuple[str, ...]:
    """Return the names of the units of a checkpoint, if its representation file stores them."""
    for path in latent_paths(row.run_dir):
        with contextlib.suppress(UserError, ConfigError):
            latents = read_latent_file(path)
            if latents.num_samples == row.step:
                return latents.unit_names or ()
    return ()


def _dataset_text(tasks: Record, row: Row) -> str:
    """Return the data set, its variant and its factors in one line."""
    dataset = next((entry["dataset"] for entry in tasks.values() if entry.get("dataset")), {})
    words = [str(dataset.get("name") or row.dataset or "unnamed data set")]
    words += [f"{key} {value}" for key, value in dataset.get("variant", {}).items()]
    if dataset.get("factors"):
        words.append(" x ".join(f"{name} {size}" for name, size in dataset["factors"].items()))
    return ", ".join(words)


def _score_table(rows: Sequence[Row]) -> str:
    content = table_content(rows)
    body = []
    for line in content.lines:
        figures = [re.sub("([±@]) ", "\\1\N{NO-BREAK SPACE}", text) for text in content.texts(line)]
        body.append(([line.experiment, line.run, line.checkpoint, line.step, *figures], line.kind))
    headings = ["experiment", "run", "checkpoint", "step", *map(columns().get, content.figures)]
    notes = "".join(html.paragraph(note, soft=True) for note in content.notes)
    return html.table(headings, body, num_words=3) + notes


def _heat_maps(tasks: Record, unit_names: Sequence[str]) -> str:
    """Return heat maps of the units' importance for factors (DCI) and of their mutual information with factors."""
    factors = next((list(entry["factors"]) for entry in tasks.values() if entry.get("factors")), [])
    found = []
    importances = [tasks.get(f"dci/{number}", {}).get("result", {}).get("importance") for number in range(len(factors))]
    if importances and all(importances):
        values, names = _strongest(np.array(importances, dtype=float), unit_names)
        chart = heat_map(values, factors, names, "DCI importances")
        found.append(html.card("Importance of each unit for each factor", chart, _IMPORTANCE_NOTE))
    information = tasks.get(INFORMATION.key, {}).get("result")
    if information:
        values = np.array(information["mutual_information"], dtype=float).T  # (F, K)
        entropies = np.maximum(np.array(information["entropies"], dtype=float)[:, None], 1e-12)
        shares, names = _strongest(values / entropies, unit_names)
        chart = heat_map(shares, factors, names, "mutual information")
        found.append(html.card("Mutual information of each unit with each factor", chart, _INFORMATION_NOTE))
    return html.cards(found)


def _strongest(values: np.ndarray, unit_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the strongest units of values (F, K) and their names; units are counted from 1, as in all pictures."""
    count = values.shape[1]
    kept = np.sort(np.argsort(-values.max(axis=0), kind="stable")[:MAX_UNITS_SHOWN])
    named = len(unit_names) == count
    return values[:, kept], [f"{unit + 1} {unit_names[unit] if named else ''}".strip() for unit in kept]


def _scores(rows: Iterable[Row]) -> dict[str, str]:
    """Return the scores that at least one row has, with their headings."""
    found = {name for row in rows for name in row.figures} - RESULTS.keys()
    return {name: heading for name, heading in columns().items() if name in found}


def _curves(runs: Sequence[Sequence[Row]]) -> str:
    """Return a chart per score with a curve per run; for a single run, single seeds of the metrics are points."""
    if all(len(rows) < 2 for rows in runs):
        return ""
    charts = []
    for name, heading in _scores(row for rows in runs for row in rows).items():
        lines = []
        for number, rows in enumerate(runs):
            points = [(row.step, row.figures[name]) for row in rows if name in row.figures]
            seeds = [(row.step, found) for row in rows for found in row.by_seed.values() if len(row.by_seed) > 1]
            scatter = [(step, found[name]) for step, found in seeds if name in found and len(runs) == 1]
            lines += [Series(rows[-1].run, points, scatter, number)] if points else []
        charts.append(html.card(heading, curves(lines, heading)))
    if len(runs) == 1:
        return html.cards(charts)
    note = html.paragraph(f"Colours repeat after {NUM_COLOURS} runs.", soft=True) if len(runs) > NUM_COLOURS else ""
    return html.legend([rows[-1].run for rows in runs]) + note + html.cards(charts)


def _seed_strips(row: Row) -> str:
    """Return the scores of one checkpoint, with a point per seed of the metrics."""
    if len(row.by_seed) < 2:
        return ""
    groups = [
        (heading, [(f"seed {seed}", found[name]) for seed, found in row.by_seed.items() if name in found])
        for name, heading in _scores([row]).items()
    ]
    return html.cards([html.card("Last checkpoint", strip(groups, "scores by seed of the metrics"))])


def _run_strips(last: Sequence[Row]) -> str:
    """Return a chart per score with the last checkpoint of each run as a point, by experiment."""
    charts = []
    for name, heading in _scores(last).items():
        groups = by_experiment(row for row in last if name in row.figures)
        points = [(label, [(row.run, row.figures[name]) for row in rows]) for label, rows in groups.items()]
        charts.append(html.card(heading, strip(points, heading)))
    return html.cards(charts)


def _scoring_facts(tasks: Record) -> dict[str, Any]:
    """Return protocol, seed, arguments and versions of the scores."""
    facts: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    for name, entry in tasks.items():
        metric = name.split("/")[0]
        if metric != INFORMATION.key:
            facts |= {name: entry.get(name) for name in ("protocol", "seed", "standardized")}
            facts |= {
                name.replace("_", " "): value
                for name, value in entry.get("dataset", {}).items()
                if name not in ("name", "variant", "factors")
            }
            facts[metric] = ", ".join(f"{key} {value}" for key, value in entry.get("arguments", {}).items())
            versions |= {f"version of {key}": value for key, value in entry.get("versions", {}).items()}
    return facts | versions


def _training_facts(run_dir: Path) -> dict[str, Any]:
    """Return settings and versions of a run's ``run.json``."""
    record: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        record = read_json(run_dir / RUN_FILE)
    names = ("seed", "status", "started", "seconds", "global_step", "learning_rate")
    facts = {name: record[name] for name in names if name in record}
    facts |= {f"version of {key}": value for key, value in record.get("versions", {}).items()}
    if record.get("git"):
        dirty = " (with changes)" if record["git"].get("dirty") else ""
        facts["source"] = f"{record['git'].get('revision', '')}{dirty}"
    if record.get("command"):
        facts["command"] = " ".join(map(str, record["command"]))
    return facts


def _config(run_dir: Path) -> str:
    paths = sorted((run_dir / "configs").glob("*-project.yaml"))
    return html.folded(f"config: {paths[-1].name}", paths[-1].read_text(encoding="utf-8")) if paths else ""
