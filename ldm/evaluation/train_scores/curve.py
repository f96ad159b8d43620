"""The scores of a run over time, as a CSV file and as a chart."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from ldm.metrics import Metric
from ldm.pictures.charts import score_chart
from ldm.util import atomic_write

FILE = "scores.csv"
PICTURE = "scores.png"


class ScoreCurve:
    """Rows of ``<run>/scores.csv``: step, seconds of training, one column per score.

    Args:
        run_dir: the run folder.
        metrics: the scores by name, in the order of their columns.
    """

    def __init__(self, run_dir: Path, metrics: Mapping[str, Metric]) -> None:
        self.run_dir, self.metrics = Path(run_dir), metrics
        self.rows: list[dict[str, float]] = []

    def continue_from(self, step: int) -> None:
        """Read the rows of an earlier part of the run up to and including ``step``; 0 starts a new file."""
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
            writer = csv.DictWriter(stream, ["step", "seconds", *self.metrics], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "step": int(row["step"])} for row in self.rows)

    def draw(self, baseline: Mapping[str, float], baseline_label: str) -> Path:
        """Draw all scores over the steps, and those of a baseline (may be empty); return ``<run>/scores.png``."""
        curves, best = {}, {}
        for name, metric in self.metrics.items():
            values = curves[metric.heading] = [row.get(name, math.nan) for row in self.rows]
            known = [position for position, value in enumerate(values) if not math.isnan(value)]
            if known:
                choose = max if metric.higher_is_better else min
                best[metric.heading] = choose(known, key=values.__getitem__)
        lines = {self.metrics[name].heading: score for name, score in baseline.items() if name in self.metrics}
        steps = [row["step"] for row in self.rows]
        return score_chart(steps, curves, best, lines, baseline_label, self.run_dir / PICTURE)
