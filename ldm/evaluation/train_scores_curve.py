"""The scores of a run over time: one CSV file, one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.util import atomic_write

FILE = "scores.csv"
PICTURE = "scores.png"


class ScoreCurve:
    """Rows of ``<run>/scores.csv``: step, seconds of training so far, one column per score.

    Args:
        run_dir: the run's folder.
        names: the scores, in the order of their columns.
    """

    def __init__(self, run_dir: Path, names: Sequence[str]) -> None:
        self.run_dir, self.names = Path(run_dir), tuple(names)
        self.rows: list[dict[str, float]] = []

    def continue_from(self, step: int) -> None:
        """Take up what an earlier part of the run wrote up to and including ``step``; 0 starts anew."""
        path = self.run_dir / FILE
        self.rows = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
            self.rows = [row for row in rows if row["step"] <= step]

    @property
    def seconds(self) -> float:
        """Seconds of training up to the last row."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    def add(self, step: int, seconds: float, scores: Mapping[str, float]) -> None:
        """Add a row and write the file."""
        self.rows.append({"step": step, "seconds": round(seconds, 1), **scores})
        with atomic_write(self.run_dir / FILE) as stream:
            writer = csv.DictWriter(stream, ["step", "seconds", *self.names], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "step": int(row["step"])} for row in self.rows)

    def draw(self, labels: Mapping[str, str], baseline: Mapping[str, float], baseline_label: str) -> Path:
        """Draw all scores over the steps.

        Args:
            labels: what each score is called.
            baseline: scores to compare with, drawn as dashed lines; may be empty.
            baseline_label: what they are the scores of.

        Returns:
            ``<run>/scores.png``.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for number, name in enumerate(self.names):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if not points:
                continue
            steps, values = zip(*points)
            best = max(range(len(values)), key=lambda place: values[place])
            label = f"{labels[name]}: best {values[best]:.3f} at step {steps[best]:,.0f}, last {values[-1]:.3f}"
            axes.plot(steps, values, marker="o", markersize=3, color=f"C{number}", label=label)
            axes.plot(steps[best], values[best], marker="*", markersize=11, color=f"C{number}")
            if name in baseline:
                text = f"{labels[name]} of {baseline_label}: {baseline[name]:.3f}"
                axes.axhline(baseline[name], linestyle="--", linewidth=1, color=f"C{number}", label=text)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("training step")
        axes.set_ylabel("score")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False, ncols=2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        path = self.run_dir / PICTURE
        with atomic_write(path, "wb") as stream:
            stream.write(buffer.getvalue())
        return path
