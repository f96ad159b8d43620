"""Page of a report: one self-contained HTML file for light and dark screens and for print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from ldm.scoring.report.pictures import Picture
from ldm.scoring.report.svg import NUM_COLOURS

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f24; --soft: #5c6470; --line: #d9dde3; --panel: #f5f6f8;
  --heat: #1f5fa8; --c0: #1f5fa8; --c1: #c4501b; --c2: #2e7d4f; --c3: #8a3ea3; --c4: #a67c00; --c5: #0f7f8c;
  --c6: #b3245a; --c7: #5b5f66; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #e6e8ec; --soft: #9aa3b0; --line: #333a44; --panel: #1e2229; --heat: #69a8ee;
    --c0: #69a8ee; --c1: #f0905e; --c2: #6cc491; --c3: #c68bdd; --c4: #dbb54a; --c5: #56c2cf; --c6: #ee7ba6;
    --c7: #b4bac4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 36px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 6px; } p { margin: 6px 0; max-width: 80ch; } .soft, figcaption {
  color: var(--soft); font-size: .87rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: 4px 9px; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } td.n, th.n { text-align: right; white-space: normal; }
tr.mean td { font-weight: 600; } tr.published td { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 18px; } .card { background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: 12px 14px; max-width: 100%; } figure { margin: 0; }
figcaption { max-width: 46ch; margin-top: 6px; }
.pictures { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; } .pictures img {
  max-width: min(100%, 780px); height: auto; border: 1px solid var(--line); border-radius: 4px; background: #fff; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .87rem; margin: 4px 0 10px; } .legend i {
  display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
svg { display: block; max-width: none; } svg text { font: 12px system-ui, -apple-system, "Liberation Sans", sans-serif;
  fill: var(--ink); } .heat { fill: var(--heat); stroke: var(--line); } svg text.on { fill: var(--paper); }
.grid { stroke: var(--line); stroke-width: 1; } polyline { fill: none; stroke-width: 2; } line { stroke-width: 3; }
.faint { opacity: .45; }
details { margin: 8px 0; } summary { cursor: pointer; } pre { background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: 12px; overflow: auto; max-height: 70vh; font-size: .82rem; line-height: 1.4; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  th, td { white-space: normal; padding: 2px 4px; font-size: 8pt; } td:nth-child(2) { overflow-wrap: anywhere; }
  .wide { overflow: visible; } .cards { gap: 10px; } .card { max-width: 48%; } .card svg { max-width: 100%;
    height: auto; } .pictures img { max-width: 100%; max-height: 22cm; width: auto; }
  figure, tr, .card { break-inside: avoid; } h2 { break-after: avoid; } }
""" + "".join(
    f".c{number} {{ stroke: var(--c{number}); }} circle.c{number} {{ fill: var(--c{number}); stroke: none; }} "
    f"i.c{number} {{ background: var(--c{number}); }}\n"
    for number in range(NUM_COLOURS)
)

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="soft">$subtitle</p>
</header>
$body
</body>
</html>
""")


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """Return the whole file."""
    return _PAGE.substitute(title=escape(title), style=STYLE, subtitle=escape(subtitle), body="\n".join(sections))


def section(heading: str, *content: str) -> str:
    """Return a heading with its content; empty if there is no content."""
    inner = "\n".join(text for text in content if text)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{inner}\n</section>" if inner else ""


def paragraph(text: str, soft: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def table(headings: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], num_words: int = 1) -> str:
    """Return a table.

    Args:
        headings: headings of the columns.
        rows: (cells, class of the row).
        num_words: number of columns that hold words; the others hold numbers.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        marks = ["" if position < num_words else ' class="n"' for position in range(len(texts))]
        return "".join(f"<{tag}{mark}>{escape(text)}</{tag}>" for mark, text in zip(marks, texts))

    body = "\n".join(f'<tr class="{kind}">{cells("td", texts)}</tr>' for texts, kind in rows)
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def pairs(content: Mapping[str, object]) -> str:
    """Return a table of names and values."""
    return table(("", ""), [((name, str(value)), "") for name, value in content.items()], num_words=2)


def card(heading: str, chart: str, note: str = "") -> str:
    """Return a chart with its heading."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<div class="card"><h3>{escape(heading)}</h3><figure class="wide">{chart}{caption}</figure></div>'


def cards(found: Sequence[str]) -> str:
    """Return cards side by side."""
    return _block("cards", found)


def legend(names: Sequence[str]) -> str:
    """Return names with their colours, in order."""
    items = [f'<span><i class="c{number % NUM_COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(names)]
    return _block("legend", items)


def pictures(found: Iterable[Picture]) -> str:
    """Return pictures with their titles."""
    figures = [
        f'<figure><img src="{picture.data}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(picture.title, quote=True)}"><figcaption>{escape(picture.title)}</figcaption></figure>'
        for picture in found
    ]
    return _block("pictures", figures)


def _block(kind: str, items: Sequence[str]) -> str:
    return f'<div class="{kind}">\n' + "\n".join(items) + "\n</div>" if items else ""


def folded(summary: str, text: str) -> str:
    """Return a long text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
