"""Tables as text, and their division into tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table


class TextTable(NamedTuple):
    """A table as text, for all formats."""

    title: str
    headings: list[str]
    rows: list[tuple[str, list[str]]]  # (section, cells): rows with equal sections are grouped
    notes: list[str]
    num_words: int  # number of columns that hold words; the others hold numbers


def fitting(remaining: Sequence[Any], table_of: Callable[[Sequence[Any]], Table], width: int) -> list[Table]:
    """Return tables of as many of the columns as fit ``width`` characters; the last one has the notes."""
    tables = []
    console = Console(width=10_000)
    while remaining:
        for count in range(len(remaining), 0, -1):
            table = table_of(remaining[:count])
            if count == 1 or Measurement.get(console, console.options, table).maximum <= width:
                break
        tables.append(table)
        remaining = remaining[count:]
    for table in tables[:-1]:
        table.caption = None
    return tables


def text_tables(content: TextTable, width: int) -> list[Table]:
    """Return the table for a terminal, divided into several tables of fewer numbers so that each fits ``width``."""

    def table_of(shown: Sequence[int]) -> Table:
        table = Table(title=content.title, caption=escape("\n".join(content.notes)) or None, caption_justify="left")
        for heading in content.headings[: content.num_words]:
            table.add_column(heading, overflow="fold")
        for position in shown:
            table.add_column(content.headings[position].replace(" ", "\n"), justify="right", no_wrap=True)
        above = None
        for section, cells in content.rows:
            if above not in (None, section):
                table.add_section()
            table.add_row(*map(escape, cells[: content.num_words]), *(cells[position] for position in shown))
            above = section
        return table

    return fitting(range(content.num_words, len(content.headings)), table_of, width)
