"""Charts of reports as inline SVG: heat maps, curves, strips of points. The page defines the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

NUM_COLOURS = 8  # classes c0 to c7 of the page
_CELL_WIDTH = 44  # pixels; narrower if there are many columns
_LETTER_WIDTH = 6.6  # approximate width of a letter of 12 pixels


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    name: str  # in the legend
    points: Sequence[tuple[float, float]]  # (x, y) in order of x, joined by a line
    scatter: Sequence[tuple[float, float]] = ()  # further (x, y), drawn as faint points
    colour: int = 0


def heat_map(values: np.ndarray, row_names: Sequence[str], column_names: Sequence[str], label: str) -> str:
    """Draw a table of shares as shaded cells with their numbers.

    Args:
        values: (R, C) in [0, 1]; 1 is fully shaded.
        row_names: R names.
        column_names: C names, rotated if they are long.
        label: description for screen readers.
    """
    num_rows, num_columns = values.shape
    width = _CELL_WIDTH if num_columns <= 24 else max(12, 1056 // num_columns)
    height, left = 26, 12 + _LETTER_WIDTH * max(map(len, row_names))
    longest = max(map(len, column_names)) * _LETTER_WIDTH
    is_rotated = longest > width - 4
    rise = longest * 0.75 if is_rotated else 0.0
    top = 12 + rise if is_rotated else 22
    shapes = [_text(left - 6, top + row * height + 17, name, "end") for row, name in enumerate(row_names)]
    for column, name in enumerate(column_names):
        x = left + column * width + width / 2
        turn = f' transform="rotate(-45 {x:.1f} {top - 6:.1f})"' if is_rotated else ""
        shapes.append(_text(x, top - 6, name, "start" if is_rotated else "middle", turn))
    for (row, column), value in np.ndenumerate(values):
        x, y = left + column * width, top + row * height
        share = min(1.0, max(0.0, float(value)))
        title = f"{row_names[row]}, {column_names[column]}: {value:.3f}"
        shapes.append(
            f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{width - 2}" height="{height - 2}" '
            f'fill-opacity="{share:.3f}"><title>{escape(title)}</title></rect>'
        )
        if width >= 30 and share >= 0.005:
            kind = "on" if share > 0.55 else "off"
            shapes.append(_text(x + width / 2 - 1, y + 16, f"{value:.2f}", "middle", f' class="{kind}"'))
    return _svg(left + num_columns * width + rise, top + num_rows * height + 4, shapes, label)


def _text(x: float, y: float, text: str, anchor: str = "start", attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{escape(str(text))}</text>'


def _svg(width: float, height: float, shapes: Sequence[str], label: str) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(label, quote=True)}">{"".join(shapes)}</svg>'


class _Frame:
    """A chart with axes, to which shapes are added in the units of the data."""

    height = 250
    left, right, top, bottom = 46, 26, 12, 30

    def __init__(self, y_values: Sequence[float], x_range: tuple[float, float], width: float = 460) -> None:
        self.width, self._x_range = width, x_range
        low, high = min(y_values), max(y_values)
        if low >= 0 and high <= 1 and high > 0.3:
            low, high = 0.0, 1.0  # scores are compared on their whole range
        elif low >= 0:
            low = 0.0
        ticks = nice_ticks(low, high)
        self._low, self._high = min(low, ticks[0]), max(high, ticks[-1])
        self.shapes: list[str] = []
        for tick in ticks:
            y = f"{self.y(tick):.1f}"
            across = f'x1="{self.left}" x2="{self.width - self.right}"'
            self.shapes.append(f'<line class="grid" {across} y1="{y}" y2="{y}"/>')
            self.shapes.append(_text(self.left - 6, self.y(tick) + 4, f"{tick:g}", "end"))

    def x(self, value: float) -> float:
        """Return pixels from the left."""
        first, last = self._x_range
        share = 0.5 if first == last else (value - first) / (last - first)
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Return pixels from the top."""
        share = (value - self._low) / (self._high - self._low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def add_label(self, value: float, text: str) -> None:
        """Add a number or word below the chart."""
        self.shapes.append(_text(self.x(value), self.height - self.bottom + 18, text, "middle"))

    def add_point(self, x: float, y: float, kind: str, radius: float, title: str) -> None:
        """Add a point; x in pixels."""
        centre = f'cx="{x:.1f}" cy="{self.y(y):.1f}"'
        self.shapes.append(f'<circle class="{kind}" {centre} r="{radius}"><title>{escape(title)}</title></circle>')

    def svg(self, label: str) -> str:
        """Return the chart."""
        return _svg(self.width, self.height, self.shapes, label)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def curves(series: Sequence[Series], label: str) -> str:
    """Draw curves over the steps of checkpoints."""
    points = [point for curve in series for point in (*curve.points, *curve.scatter)]
    steps = sorted({x for x, _ in points})
    frame = _Frame([y for _, y in points], (steps[0], steps[-1]))
    ticks = [tick for tick in nice_ticks(steps[0], steps[-1], 4) if steps[0] <= tick <= steps[-1]]
    for tick in ticks if len(steps) > 1 else steps:
        frame.add_label(tick, f"{tick:,.0f}")
    for curve in series:
        colour = f"c{curve.colour % NUM_COLOURS}"
        if len(curve.points) > 1:
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve.points)
            frame.shapes.append(f'<polyline class="{colour}" points="{path}"/>')
        for group, kind, radius in ((curve.scatter, f"{colour} faint", 2.5), (curve.points, colour, 3.2)):
            for x, y in group:
                frame.add_point(frame.x(x), y, kind, radius, f"{curve.name}: {y:.4f} at step {x:,.0f}")
    return frame.svg(label)


def strip(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str) -> str:
    """Draw groups of points side by side, with a bar at the mean of each group.

    Args:
        groups: (name, [(name of a point, value)]) from left to right.
        label: description for screen readers.
    """
    width = min(1080, max(460, 84 * len(groups)))
    frame = _Frame([value for _, points in groups for _, value in points], (-0.5, len(groups) - 0.5), width)
    space = (frame.width - frame.left - frame.right) / len(groups)
    letters, reach = max(3, int(space / _LETTER_WIDTH) - 1), min(24.0, space * 0.3)
    for position, (name, points) in enumerate(groups):
        colour, x = f"c{position % NUM_COLOURS}", frame.x(position)
        frame.add_label(position, name if len(name) <= letters else f"{name[: letters - 1]}…")
        y = f"{frame.y(sum(value for _, value in points) / len(points)):.1f}"
        across = f'x1="{x - reach:.1f}" x2="{x + reach:.1f}"'
        frame.shapes.append(f'<line class="{colour}" {across} y1="{y}" y2="{y}"/>')
        for number, (point, value) in enumerate(points):
            shift = 0.0 if len(points) == 1 else (number / (len(points) - 1) - 0.5) * reach
            frame.add_point(x + shift, value, colour, 4, f"{name}, {point}: {value:.4f}")
    return frame.svg(label)


def intervals(
    groups: Sequence[tuple[str, float, tuple[float, float] | None, Sequence[tuple[str, float, int]]]], label: str
) -> str:
    """Draw a value with its interval for each group, and values to compare with beside it.

    Args:
        groups: (name, value, interval, [(name, value, colour)]) from left to right; colour 0 is that of the value.
        label: description for screen readers.
    """
    values = [value for _, figure, bounds, others in groups for value in (figure, *(bounds or ()))]
    values += [value for *_, others in groups for _, value, _ in others]
    width = min(1080, max(460, 120 * len(groups)))
    frame = _Frame(values, (-0.5, len(groups) - 0.5), width)
    space = (frame.width - frame.left - frame.right) / len(groups)
    letters = max(3, int(space / _LETTER_WIDTH) - 1)
    for position, (name, figure, bounds, others) in enumerate(groups):
        x = frame.x(position) - space * 0.3
        frame.add_label(position, name if len(name) <= letters else f"{name[: letters - 1]}…")
        if bounds is not None:
            low, high = (f"{frame.y(bound):.1f}" for bound in bounds)
            ends = ((x, x, low, high), (x - 6, x + 6, low, low), (x - 6, x + 6, high, high))
            for left, right, first, last in ends:
                across = f'x1="{left:.1f}" x2="{right:.1f}"'
                frame.shapes.append(f'<line class="c0" {across} y1="{first}" y2="{last}"/>')
        text = "" if bounds is None else f" ({bounds[0]:.4f} to {bounds[1]:.4f})"
        frame.add_point(x, figure, "c0", 4, f"{name}: {figure:.4f}{text}")
        for number, (other, value, colour) in enumerate(others, start=1):
            place = x + space * 0.62 * number / len(others)
            frame.add_point(place, value, f"c{colour % NUM_COLOURS}", 3.2, f"{name}, {other}: {value:.4f}")
    return frame.svg(label)
