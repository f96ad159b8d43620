"""Charts of reports as inline SVG: heat maps, curves over checkpoints, points of seeds. Colours come from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

NUM_COLOURS = 8  # classes c0 to c7 of the page
_CELL = 44  # pixels of a heat map's cell; narrower where there are many columns
_LETTER = 6.6  # width of a letter of 12 pixels, roughly


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: of the legend.
        points: (x, y) in order of x; joined by a line.
        scatter: further (x, y) drawn as faint points, e.g. single seeds.
        colour: number of its colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    scatter: Sequence[tuple[float, float]] = field(default_factory=tuple)
    colour: int = 0


def heat_map(values: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], label: str) -> str:
    """A table of shares as shaded cells with their numbers.

    Args:
        values: (R, C) in [0, 1]; 1 is shaded fully.
        row_names: R names, written in full.
        column_names: C names; turned where they are long.
        label: what it shows, for those who cannot see it.
    """
    num_rows, num_columns = values.shape
    width = _CELL if num_columns <= 24 else max(12, 1056 // num_columns)
    height, left = 26, 12 + _LETTER * max(map(len, row_names))
    longest = max(map(len, column_names))
    is_turned = longest * _LETTER > width - 4
    top = 12 + longest * _LETTER * 0.75 if is_turned else 22
    parts = []
    for row, name in enumerate(row_names):
        parts.append(_text(left - 6, top + row * height + 17, name, "end"))
    for column, name in enumerate(column_names):
        x = left + column * width + width / 2
        turn = f' transform="rotate(-45 {x:.1f} {top - 6:.1f})"' if is_turned else ""
        parts.append(_text(x, top - 6, name, "start" if is_turned else "middle", turn))
    for (row, column), value in np.ndenumerate(values):
        x, y = left + column * width, top + row * height
        share = min(1.0, max(0.0, float(value)))
        title = f"{row_names[row]}, {column_names[column]}: {value:.3f}"
        parts.append(
            f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{width - 2}" height="{height - 2}" '
            f'fill-opacity="{share:.3f}"><title>{escape(title)}</title></rect>'
        )
        if width >= 30 and share >= 0.005:
            kind = "on" if share > 0.55 else "off"
            parts.append(_text(x + width / 2 - 1, y + 16, f"{value:.2f}", "middle", f' class="{kind}"'))
    turned = longest * _LETTER * 0.75 if is_turned else 0
    return _svg(left + num_columns * width + turned, top + num_rows * height + 4, parts, label)


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(str(text))}</text>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'


class _Frame:
    """Axes of a chart: where values stand on it."""

    height = 250
    left, right, top, bottom = 46, 26, 12, 30

    def __init__(self, y_values: Sequence[float], x_range: tuple[float, float], width: float = 460) -> None:
        self.width = width
        low, high = min(y_values), max(y_values)
        if low >= 0 and high <= 1 and high > 0.3:
            low, high = 0.0, 1.0  # scores compare best on their whole range
        elif low >= 0:
            low = 0.0
        self.y_ticks = nice_ticks(low, high)
        self._low, self._high = min(low, self.y_ticks[0]), max(high, self.y_ticks[-1])
        self._first, self._last = x_range

    def x(self, value: float) -> float:
        """Pixels from the left."""
        span = self._last - self._first
        share = 0.5 if span == 0 else (value - self._first) / span
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        share = (value - self._low) / (self._high - self._low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def grid(self) -> list[str]:
        """Lines and numbers of the upright axis."""
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            across = f'x1="{self.left}" x2="{self.width - self.right}"'
            parts.append(f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(self.left - 6, y + 4, f"{tick:g}", "end"))
        return parts

    def x_label(self, value: float, text: str) -> str:
        """A number or word below the chart."""
        return _text(self.x(value), self.height - self.bottom + 18, text, "middle")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def curves(series: Sequence[Series], label: str) -> str:
    """Lines over the steps of checkpoints, single seeds as points; a line of one point is drawn as a point."""
    points = [point for line in series for point in (*line.points, *line.scatter)]
    steps = sorted({x for x, _ in points})
    frame = _Frame([y for _, y in points], (steps[0], steps[-1]))
    parts = frame.grid()
    ticks = [tick for tick in nice_ticks(steps[0], steps[-1], 4) if steps[0] <= tick <= steps[-1]]
    parts += [frame.x_label(tick, f"{tick:,.0f}") for tick in (ticks if len(steps) > 1 else steps)]
    for line in series:
        colour = f"c{line.colour % NUM_COLOURS}"
        parts += [_dot(frame, point, f"{colour} faint", 2.5, line.name) for point in line.scatter]
        if len(line.points) > 1:
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
            parts.append(f'<polyline class="{colour}" points="{path}"/>')
        parts += [_dot(frame, point, colour, 3.2, line.name) for point in line.points]
    return _svg(frame.width, frame.height, parts, label)


def _dot(frame: _Frame, point: tuple[float, float], kind: str, radius: float, name: str) -> str:
    title = f"{name}: {point[1]:.4f} at step {point[0]:,.0f}"
    return (
        f'<circle class="{kind}" cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="{radius}">'
        f"<title>{escape(title)}</title></circle>"
    )


def strip(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str) -> str:
    """Points of runs side by side, a bar at the mean of each group.

    Args:
        groups: (name, [(name of a point, value)]) from left to right.
        label: what it shows.
    """
    width = min(1080, max(460, 84 * len(groups)))
    frame = _Frame([value for _, points in groups for _, value in points], (-0.5, len(groups) - 0.5), width)
    parts = frame.grid()
    room = (frame.width - frame.left - frame.right) / len(groups)
    for place, (name, points) in enumerate(groups):
        colour = f"c{place % NUM_COLOURS}"
        letters = max(3, int(room / _LETTER) - 1)
        parts.append(frame.x_label(place, name if len(name) <= letters else f"{name[: letters - 1]}…"))
        mean = sum(value for _, value in points) / len(points)
        x, reach = frame.x(place), min(24.0, room * 0.3)
        parts.append(
            f'<line class="{colour}" x1="{x - reach:.1f}" x2="{x + reach:.1f}" y1="{frame.y(mean):.1f}" '
            f'y2="{frame.y(mean):.1f}"/>'
        )
        for number, (point, value) in enumerate(points):
            shift = 0.0 if len(points) == 1 else (number / (len(points) - 1) - 0.5) * reach
            title = escape(f"{name}, {point}: {value:.4f}")
            parts.append(
                f'<circle class="{colour}" cx="{x + shift:.1f}" cy="{frame.y(value):.1f}" r="4">'
                f"<title>{title}</title></circle>"
            )
    return _svg(frame.width, frame.height, parts, label)
