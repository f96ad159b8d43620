"""Charts drawn with matplotlib: annotated heat maps, and scores over training steps."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.util import atomic_write

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def heat_map(
    matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: str | os.PathLike
) -> Path:
    """Draw a matrix as colored cells that contain the numbers.

    Args:
        matrix: (len(rows), len(columns)) float in [0, 1]; NaN cells are grey with a dash.
        rows: name of each row, top to bottom.
        columns: name of each column, left to right.
        title: text above; may contain newlines.
        path: PNG file to write, which is returned.

    Raises:
        ValueError: the matrix does not have one row and one column per name.
    """
    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (len(rows), len(columns)) or matrix.size == 0:
        raise ValueError(
            f"heat map {title!r}: expected a matrix of shape ({len(rows)}, {len(columns)}), one row and one column "
            f"per name, got {matrix.shape}"
        )
    figure, axes = _figure(2.6 + 0.85 * len(columns), 1.9 + 0.55 * len(rows))
    image = _draw_cells(axes, matrix)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)
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
    figure, axes = _figure(8, 4.6)
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


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of that size in inches with one set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


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
