"""Section of a report: how far the scores can be trusted, as a chart and a table."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.metrics.registry import ALL_METRICS
from ldm.metrics.trust import SHARE, VARIANTS
from ldm.scoring.report import page as html
from ldm.scoring.report.svg import intervals
from ldm.scoring.table import without_time
from ldm.scoring.trust import Trust, trust_table

_KINDS = list(dict.fromkeys(variant.kind for variant in VARIANTS.values()))
_NOTE = (
    "Point with a bar: score and interval. To the right, in the order of the table: baselines, and the same units with "
    "a changed order, scale or number."
)


def trust_section(trusts: Sequence[Trust], protocol: str) -> str:
    """Return the section, with one chart for a single run and one per metric for several; empty without ``trusts``."""
    if not trusts:
        return ""
    by_metric: dict[str, list[Trust]] = {}
    for trust in trusts:
        by_metric.setdefault(ALL_METRICS[trust.name].heading, []).append(trust)
    if all(len(found) == 1 for found in by_metric.values()):
        charts = [_card("Scores, baselines and changed units", [(name, found[0]) for name, found in by_metric.items()])]
    else:
        charts = [
            _card(name, [(without_time(trust.row.run), trust) for trust in found]) for name, found in by_metric.items()
        ]
    table = trust_table(trusts, protocol)
    notes = "".join(html.paragraph(note, soft=True) for note in table.notes)
    body = html.table(table.headings, [(cells, "") for _, cells in table.rows], table.num_words)
    legend = html.legend([f"score, {SHARE:.0%} interval", *_KINDS])
    return html.section(table.title, legend, html.cards(charts), body + notes)


def _card(heading: str, trusts: Sequence[tuple[str, Trust]]) -> str:
    groups = [
        (
            name,
            trust.figure,
            trust.interval,
            [
                (VARIANTS[key].heading, value, _KINDS.index(VARIANTS[key].kind) + 1)
                for key, value in trust.variants.items()
            ],
        )
        for name, trust in trusts
    ]
    return html.card(heading, intervals(groups, heading), _NOTE)
