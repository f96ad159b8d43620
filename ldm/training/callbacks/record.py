"""CSV record of the training losses, as in EncDiff."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ldm.ranges import PositiveInt


class Record:
    """Appends the training losses to ``<run>/record.csv``.

    Args:
        plot_image: without effect, accepted for EncDiff's configs.
        every_step_num: steps between two rows.
    """

    def __init__(self, plot_image: bool = False, every_step_num: PositiveInt = 200) -> None:
        self.plot_image, self.every_step_num = plot_image, every_step_num

    def write(self, run_dir: str | Path, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row if due: the step, and the metrics that start with ``train/``.

        The columns of an existing file are kept.
        """
        if step % self.every_step_num:
            return
        path = Path(run_dir) / "record.csv"
        row = {"step": step} | {name: float(value) for name, value in metrics.items() if name.startswith("train/")}
        columns, is_new = list(row), not path.is_file()
        if not is_new:
            with path.open(newline="", encoding="utf-8") as stream:
                columns = next(csv.reader(stream), columns)
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
