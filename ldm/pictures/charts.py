"""Charts drawn with matplotlib: annotated heat maps, and scores and losses over training steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.pictures.captions import load_font, wrap_text
from ldm.util import atomic_write

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_ROW_WIDTH = 360  # pixels of a line of row names in a font of 10 pixels, divided by the number of panels


def heat_map(
    matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: str | os.PathLike
) -> Path:
    """Draw a matrix as colored cells that contain the numbers: :func:`heat_maps` of one matrix with that title."""
    return heat_maps({title: matrix}, rows, columns, "", path)


def heat_maps(
    matrices: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], title: str, path: str | os.PathLike
) -> Path:
    """Draw matrices of the same rows and columns side by side, as colored cells that contain the numbers.

    Args:
        matrices: title of each panel -> (len(rows), len(columns)) float; the colors cover [0, 1], NaN is a grey dash.
        rows: name of each row, top to bottom; long ones are wrapped.
        columns: name of each column, left to right.
        title: text above all panels; empty for none. All titles may contain newlines.
        path: PNG file to write, which is returned.

    Raises:
        ValueError: there is no matrix, or one does not have one row and one column per name.
    """
    panels = {name: np.asarray(matrix, dtype=float) for name, matrix in matrices.items()}
    shapes = {name: matrix.shape for name, matrix in panels.items()}
    if set(shapes.values()) != {(len(rows), len(columns))} or 0 in (len(rows), len(columns)):
        raise ValueError(
            f"heat map: expected a matrix of shape ({len(rows)}, {len(columns)}), one row and one column per name, "
            f"got {', '.join(f'{shape} for {name!r}' for name, shape in shapes.items()) or 'none'}"
        )
    texts = [wrap_text(row, load_font(10), max(120, _ROW_WIDTH // len(panels)))[0] for row in rows]
    height = max(0.55, 0.2 * max(map(len, texts)))  # of a row, in inches
    widest = max(load_font(10).getlength(line) for lines in texts for line in lines) / 72  # inches
    titles = max(load_font(11).getlength(line) for name in panels for line in name.splitlines() or [""]) / 72
    panel = max(0.85 * len(columns), titles)
    figure = _figure(2.6 + max(0.0, widest - 1.5) + panel * len(panels), 1.9 + height * len(rows))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, matrix) in zip(grid, panels.items()):
        image = _draw_cells(axes, matrix)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_title(name, loc="left", fontsize=11)
    grid[0].set_yticks(range(len(rows)), ["\n".join(lines) for lines in texts])
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.colorbar(image, ax=grid, fraction=0.04, pad=0.02).outline.set_visible(False)
    return _save(figure, path)


def score_chart(
    steps: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    best: Mapping[str, int],
    baseline: Mapping[str, float],
    baseline_label: str,
    path: str | os.PathLike,
) -> Path:
    """Draw scores in [0, 1] over training steps.

    Args:
        steps: (n,) training steps.
        curves: label of each score -> its n values; NaN leaves a gap.
        best: label -> position of the best value; marked.
        baseline: label -> value to compare with, a dashed line; may be empty.
        baseline_label: name of the compared method.
        path: PNG file to write, which is returned.
    """
    figure = _figure(8, 4.6)
    axes = figure.add_subplot()
    for number, (label, values) in enumerate(curves.items()):
        color = f"C{number}"
        if label in best:
            top = best[label]
            text = f"{label}: best {values[top]:.3f} at step {steps[top]:,.0f}, last {values[-1]:.3f}"
            axes.plot(steps, values, marker="o", markersize=3, color=color, label=text)
            axes.plot(steps[top], values[top], marker="*", markersize=11, color=color)
        if label in baseline:
            text = f"{label} of {baseline_label}: {baseline[label]:.3f}"
            axes.axhline(baseline[label], linestyle="--", linewidth=1, color=color, label=text)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("score")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False, ncols=2)
    return _save(figure, path)


def loss_chart(
    losses: Mapping[str, Mapping[str, np.ndarray]], rates: Mapping[str, np.ndarray], path: str | os.PathLike
) -> Path:
    """Draw losses over training steps, one small panel for each loss, and the learning rates in a last one.

    Long curves of losses are averaged over a window, above their faint values. An axis is logarithmic where all values
    are positive and differ by more than a factor of 10.

    Args:
        losses: name of each loss -> label of each curve (train, val, ...) -> (2, n) steps and values, n > 0; values
            that are not finite leave a gap.
        rates: label -> (2, n) steps and learning rates; may be empty.
        path: PNG file to write, which is returned.
    """
    panels = {**losses, **({"learning rate": rates} if rates else {})}
    num_columns, num_rows = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = _figure(4.2 * num_columns, 2.8 * num_rows)
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        for number, (label, (steps, values)) in enumerate(curves.items()):
            style = {"color": f"C{number}", "marker": "" if len(values) >= 50 else "."}
            if title in losses and len(values) >= 50:
                axes.plot(steps, values, **style, alpha=0.25, linewidth=0.8)
                values = _moving_average(values, 2 * (len(values) // 50) + 1)
            axes.plot(steps, values, **style, label=label)
        finite = np.concatenate([values[np.isfinite(values)] for _, values in curves.values()])
        if finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.supxlabel("training step", fontsize=9)
    return _save(figure, path)


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the finite values (n,) in a window around each position; NaN where there is none."""
    is_finite = np.isfinite(values)
    ones = np.ones(window)
    counts = np.convolve(is_finite, ones, "same")
    return np.convolve(np.where(is_finite, values, 0.0), ones, "same") / np.where(counts > 0.5, counts, np.nan)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png")
    return Path(path)


def _draw_cells(axes: Axes, matrix: np.ndarray) -> AxesImage:
    """Draw colored cells between white lines, each with its number."""
    image = axes.imshow(np.ma.masked_invalid(matrix), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_facecolor("0.9")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(matrix.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(matrix.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    for (row, column), value in np.ndenumerate(matrix):
        ink = "white" if value > 0.6 else "0.15"
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=ink)
    return image
