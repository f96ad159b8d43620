"""EncDiff's record of the training losses: one table beside the run's own metrics."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ldm.util import ConfigError


class Record:
    """Appends the training losses to ``<run>/record.csv`` now and then.

    Args:
        plot_image: accepted for EncDiff's configs, where it makes an empty folder; TensorBoard draws the curves.
        every_step_num: steps between two rows.
    """

    def __init__(self, plot_image: bool = False, every_step_num: int = 200) -> None:
        if every_step_num < 1:
            raise ConfigError(f"log_config.params.every_step_num is {every_step_num}; expected at least 1")
        self.plot_image, self.every_step_num = plot_image, every_step_num

    def write(self, run_dir: str | Path, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row if it is time: the step, then the metrics that start with ``train/``, by name.

        A run that goes on, or logs other metrics than before, goes on in the same file under the columns it began with.
        """
        if step % self.every_step_num:
            return
        path = Path(run_dir) / "record.csv"
        row = {"step": step} | {name: float(value) for name, value in metrics.items() if name.startswith("train/")}
        columns = list(row)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                columns = next(csv.reader(stream), columns)
        is_new = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
