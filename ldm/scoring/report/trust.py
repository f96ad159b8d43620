"""Section of a report: how far the scores can be trusted, as a chart and a table."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.trust import SHARE, VARIANTS
from ldm.scoring.report import page as html
from ldm.scoring.report.svg import intervals
from ldm.scoring.trust import Trust, trust_table

_COLOURS = {name: number for number, name in enumerate(VARIANTS, start=1)}
_NOTE = (
    "Points with a bar: score and interval. To the right, in the order of the legend: baselines, then changed units."
)


def trust_section(trusts: Sequence[Trust], protocol: str) -> str:
    """Return the section, with one chart for a single run and one per metric for several; empty without ``trusts``."""
    if not trusts:
        return ""
    by_metric: dict[str, list[Trust]] = {}
    for trust in trusts:
        by_metric.setdefault(ALL_METRICS[trust.name].heading, []).append(trust)
    if all(len(found) == 1 for found in by_metric.values()):
        charts = [_card("Scores and what they depend on", [(name, found[0]) for name, found in by_metric.items()])]
    else:
        charts = [_card(name, [(trust.row.run, trust) for trust in found]) for name, found in by_metric.items()]
    names = [f"score, {SHARE:.0%} interval", *(variant.heading for variant in VARIANTS.values())]
    table = trust_table(trusts, protocol)
    notes = "".join(html.paragraph(note, soft=True) for note in table.notes)
    body = html.table(table.headings, [(cells, "") for _, cells in table.rows], table.num_words)
    return html.section(table.title, html.legend(names), html.cards(charts), body + notes)


def _card(heading: str, trusts: Sequence[tuple[str, Trust]]) -> str:
    groups = [
        (
            name,
            trust.figure,
            trust.interval,
            [(VARIANTS[key].heading, value, _COLOURS[key]) for key, value in trust.variants.items()],
        )
        for name, trust in trusts
    ]
    return html.card(heading, intervals(groups, heading), _NOTE)
