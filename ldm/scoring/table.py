"""One table over runs and seeds beside published figures: on the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ldm.scoring.published import PublishedRow, published_beside, published_sources
from ldm.scoring.rows import HEADINGS, Cell, Line, Row, shown_figures, table_lines
from ldm.util import atomic_write

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
)


def cell_text(cell: Cell | None) -> str:
    """A figure as papers print it: "0.893", "0.893 ± 0.021", "0.912 @ 2000" (step)."""
    if cell is None:
        return ""
    text = f"{cell.mean:.3f}" if cell.deviation is None else f"{cell.mean:.3f} ± {cell.deviation:.3f}"
    return text if cell.step is None else f"{text} @ {cell.step}"


def score_tables(rows: Iterable[Row], width: int) -> list[Table]:
    """``score_table``, in as many tables of fewer figures as make each fit on ``width`` letters."""
    rows = list(rows)
    shown = shown_figures(table_lines(rows))
    tables: list[Table] = []
    while shown:
        for count in range(len(shown), 0, -1):
            table = score_table(rows, shown[:count])
            if count == 1 or _needed_width(table) <= width:
                break
        tables.append(table)
        shown = shown[count:]
    for table in tables[:-1]:
        table.caption = None
    return tables


def _needed_width(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def score_table(rows: Iterable[Row], figures: Sequence[str] | None = None) -> Table:
    """The last and the best checkpoint of every run, runs of one experiment together with their mean and spread.

    Args:
        rows: of ``collect_rows``.
        figures: to show; None takes all there are.
    """
    rows = list(rows)
    lines = table_lines(rows)
    shown = shown_figures(lines) if figures is None else list(figures)
    published = published_beside([row.dataset for row in rows], shown)
    title = "Scored checkpoints: last, and best of each score (value @ step)"
    table = Table(title=title, caption=_caption(rows, published), caption_justify="left")
    for heading in ("experiment", "run"):
        table.add_column(heading, overflow="fold")
    for heading in ("", "seed", "step", "epoch", *(HEADINGS[name] for name in shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for experiment in dict.fromkeys(line.experiment for line in lines):
        for line in lines:
            if line.experiment == experiment:
                where = [line.experiment, line.what, line.which, line.seed, line.step, line.epoch]
                cells = [cell_text(line.cells.get(name)) for name in shown]
                table.add_row(*map(escape, where), *cells, style="bold" if line.is_mean else "")
        table.add_section()
    for row in published:
        where = [f"published, {row.dataset}", f"{row.method} [{row.source}]", "", "", "", ""]
        cells = [cell_text(_published_cell(row, name)) for name in shown]
        table.add_row(*map(escape, where), *cells, style="dim")
    return table


def _published(rows: Sequence[Row], lines: Sequence[Line]) -> list[PublishedRow]:
    return published_beside([row.dataset for row in rows], shown_figures(lines))


def _published_cell(row: PublishedRow, name: str) -> Cell | None:
    return Cell(*row.figures[name]) if name in row.figures else None


def _caption(rows: Sequence[Row], published: Iterable[PublishedRow]) -> str | None:
    """What deviations are over, and where the published figures were read."""
    seeds = max((len(row.by_seed) for row in rows), default=1)
    notes = [f"± in a run's line: over {seeds} seeds of the metrics' draws"] if seeds > 1 else []
    published = list(published)
    others = sorted({row.dataset for row in rows if row.dataset} - {row.dataset for row in published})
    if published and others:
        notes.append(f"the runs are of {', '.join(others)}: published figures are of other images")
    notes += source_texts(dict.fromkeys(row.source for row in published))
    return escape("\n".join(notes)) or None


def source_texts(keys: Iterable[str]) -> list[str]:
    """One line per source."""
    found = published_sources()
    return [f"[{key}] {found[key].text}; {found[key].url}. {found[key].note}" for key in keys]


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one line for each scored checkpoint, with mean and deviation over the metrics' seeds, then published ones.

    ``kind`` is "run" or "published"; ``latest`` is 1 on the line of a run's latest; ``best`` names the figures whose
    best value in the run stands there; ``scoring_seeds`` counts the metrics' seeds.
    """
    rows = list(rows)
    lines = table_lines(rows)
    best = {
        (line.experiment, line.what, cell.step, name)
        for line in lines
        if line.which == "best"
        for name, cell in line.cells.items()
    }
    with atomic_write(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        deviations = [f"{name}_std" for name in HEADINGS]
        writer.writerow(
            [
                "kind",
                "experiment",
                "run",
                "seed",
                "step",
                "epoch",
                "latest",
                "best",
                "dataset",
                "scoring_seeds",
                *HEADINGS,
                *deviations,
            ]
        )
        for row in rows:
            marks = [name for name in row.figures if (row.experiment, row.run, row.step, name) in best]
            where = [
                "run",
                row.experiment,
                row.run,
                _text(row.seed),
                row.step,
                _text(row.epoch),
                int(row.latest),
                " ".join(marks),
                row.dataset or "",
                len(row.by_seed),
            ]
            writer.writerow(
                [
                    *where,
                    *(row.figures.get(name, "") for name in HEADINGS),
                    *(row.deviations.get(name, "") for name in HEADINGS),
                ]
            )
        for row in _published(rows, lines):
            where = ["published", row.method, row.source, "", "", "", "", "", row.dataset, ""]
            cells = [row.figures.get(name, ("", "")) for name in HEADINGS]
            writer.writerow([*where, *(mean for mean, _ in cells), *(deviation for _, deviation in cells)])


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def write_markdown(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the table as Markdown, sources below it."""
    headings, body, notes = _plain_table(rows)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    marks = ["---"] * 3 + ["---:"] * (len(headings) - 3)
    lines = [line(headings), line(marks), *(line(cells) for cells, _ in body)]
    with atomic_write(path) as stream:
        stream.write("\n".join(lines) + "\n")
        stream.writelines(f"\n{note}\n" for note in notes)


def write_latex(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the table as LaTeX (package booktabs), sources as comments."""
    headings, body, notes = _plain_table(rows)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    columns = "l" * 3 + "r" * (len(headings) - 3)
    lines = [f"% {note}" for note in notes]
    lines += [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", line(headings)]
    above = None
    for cells, section in body:
        lines += [r"\midrule"] if section != above else []
        lines.append(line(cells))
        above = section
    lines += [r"\bottomrule", r"\end{tabular}"]
    with atomic_write(path) as stream:
        stream.write("\n".join(lines) + "\n")


def _plain_table(rows: Iterable[Row]) -> tuple[list[str], list[tuple[list[str], str]], list[str]]:
    """Headings, lines with the section they belong to, and sources."""
    rows = list(rows)
    lines = table_lines(rows)
    shown, published = shown_figures(lines), _published(rows, lines)

    def cells(where: Sequence[str], cell_of: Callable[[str], Cell | None]) -> list[str]:
        return [*where, *(cell_text(cell_of(name)) for name in shown)]

    body = [(cells((line.experiment, line.what, line.which), line.cells.get), line.experiment) for line in lines]
    for row in published:
        where = (f"published, {row.dataset}", f"{row.method} [{row.source}]", "")
        body.append((cells(where, lambda name, row=row: _published_cell(row, name)), "published"))
    headings = ["experiment", "run", "checkpoint", *(HEADINGS[name] for name in shown)]
    return headings, body, source_texts(dict.fromkeys(row.source for row in published))
