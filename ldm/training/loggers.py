"""Loggers: a CSV file that is continued by resumed runs, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.pictures.charts import loss_chart
from ldm.runs.folder import RunFolder
from ldm.util import UserError, atomic_write, instantiate_from_config

logger = logging.getLogger(__name__)

_LOSS = re.compile("(?:(?P<split>train|val)[/_])?(?!test|figure)(?P<name>.*loss.*?)(?:_(?P<kind>ema|epoch|step))?")


class MetricsCSVLogger(Logger):
    """Appends one row for each logging event to ``<save_dir>/<name>/version_<version>/metrics.csv``.

    Unlike Lightning's CSV logger, it keeps the rows of earlier parts of a run, does not keep a history in memory, and
    appends only new rows.

    Args:
        save_dir: folder of the run.
        name, version: names of the two folders below it, as in LDM.
        flush_logs_every_n_steps: maximum number of rows in memory.

    Attributes:
        path: the CSV file.
        log_dir: its folder.
    """

    name = version = save_dir = log_dir = None  # properties in Lightning, attributes here

    def __init__(
        self, save_dir: str, name: str = "testtube", version: int | str = 0, flush_logs_every_n_steps: int = 20
    ) -> None:
        super().__init__()
        self.save_dir = save_dir
        self.name = name
        self.version = version
        self.path = Path(save_dir, name, version if isinstance(version, str) else f"version_{version}", "metrics.csv")
        self.log_dir = str(self.path.parent)
        self._flush_every = max(1, flush_logs_every_n_steps)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._tail: set[tuple[int, frozenset[str]]] = set()

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows of an earlier part of the run before ``step``."""
        rows = self._read()
        kept = [row for row in rows if row.get("step") and int(row["step"]) < step]
        last = max((int(row["step"]) for row in kept), default=-1)
        tail = [row for row in kept if int(row["step"]) == last]
        self._tail = {(last, frozenset(key for key, value in row.items() if value not in ("", None))) for row in tail}
        if rows:
            self._rewrite(kept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one row, unless an earlier part of the run has written it."""
        row = {key: float(value) for key, value in metrics.items()}
        row["step"] = -1 if step is None else step
        if (row["step"], frozenset(row)) in self._tail:
            return
        self._rows.append(row)
        if len(self._rows) >= self._flush_every:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config is in the ``configs`` folder of the run."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows in memory."""
        if not self._rows:
            return
        if not self._columns:
            self._read()
        new = sorted({key for row in self._rows for key in row} - set(self._columns))
        if new or not self.path.is_file():
            earlier = self._read()
            self._columns += new
            self._rewrite([*earlier, *self._rows])
        else:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", newline="", encoding="utf-8") as stream:
                    csv.DictWriter(stream, self._columns).writerows(self._rows)
            except OSError as error:  # a full disk; the rows stay in memory
                os.truncate(self.path, size)
                error.filename = error.filename or str(self.path)
                raise
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows."""
        self.save()

    @rank_zero_only
    def draw_losses(self) -> None:
        """Draw all losses of the file in ``<save_dir>/losses.png``, if there are two rows; errors become a warning."""
        path = Path(self.save_dir, "losses.png")
        try:
            losses, rates = _curves_of(self._read())
            if losses:
                loss_chart(losses, rates, path)
        except Exception as error:  # matplotlib and its fonts raise many kinds of errors
            logger.warning("%s could not be drawn: %s. Training is not affected", path, error or type(error).__name__)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            # A line truncated by a crash has fewer cells; it is dropped.
            rows = [row for row in reader if None not in row and None not in row.values()]
            self._columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with atomic_write(self.path) as stream:
            writer = csv.DictWriter(stream, self._columns, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)


def _curves_of(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return the arguments of ``loss_chart``: losses that are not constantly 0, and learning rates."""
    losses: dict[str, dict[str, np.ndarray]] = {}
    rates: dict[str, np.ndarray] = {}
    for column in sorted(rows[0] if rows else ()):
        points = [(float(row["step"]), float(row[column])) for row in rows if row[column]]
        if len(points) < 2 or not any(value for _, value in points):
            continue
        if column.startswith("lr-"):
            rates[column.removeprefix("lr-")] = np.array(points).T
        elif match := _LOSS.fullmatch(column):
            label = " ".join(filter(None, match.group("split", "kind")))
            losses.setdefault(match["name"], {})[label] = np.array(points).T
    return losses, rates


def build_loggers(choice: Any, folder: RunFolder, flush_every: int | None = None, **wandb: Any) -> list[Logger]:
    """Return the loggers of a run: the CSV file, and those of the config.

    Args:
        choice: ``lightning.logger``: ``None`` (TensorBoard), a name, or ``{target, params}``.
        folder: folder of the run.
        flush_every: rows that the CSV logger keeps in memory.
        **wandb: arguments for Weights & Biases.
    """
    options = {} if flush_every is None else {"flush_logs_every_n_steps": int(flush_every)}
    loggers: list[Logger] = [MetricsCSVLogger(str(folder.path), **options)]
    if choice == "wandb":
        names = {"name": folder.path.name, "id": folder.path.name}
        choice = {"target": "pytorch_lightning.loggers.WandbLogger", "params": {**names, **wandb}}
    elif choice in (None, "tensorboard"):
        params = {"name": "tensorboard", "version": "", "default_hp_metric": False}
        choice = {"target": "pytorch_lightning.loggers.TensorBoardLogger", "params": params}
    if not isinstance(choice, Mapping):
        return loggers
    params = {"save_dir": str(folder.path), **(choice.get("params") or {})}
    try:
        own = instantiate_from_config({"target": choice["target"], "params": params}, "logger")
    except ModuleNotFoundError as error:  # loggers import their packages when they are created
        raise UserError(
            f"lightning.logger: {choice['target']} cannot be created ({str(error).splitlines()[0]}). Install the "
            "package (pip install wandb for Weights & Biases), or remove the key (lightning.logger=null)"
        ) from error
    return [own] if isinstance(own, MetricsCSVLogger) else [*loggers, own]
