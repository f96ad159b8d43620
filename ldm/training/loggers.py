"""Loggers: a CSV file that survives resuming, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.runs.folder import RunFolder
from ldm.util import UserError, atomic_write, instantiate_from_config

logger = logging.getLogger(__name__)


class MetricsCSVLogger(Logger):
    """Appends one row for each logging event to ``<save_dir>/<name>/version_<version>/metrics.csv``.

    Unlike Lightning's own, it never deletes what an earlier part of the run wrote, keeps no history in memory
    and writes on every flush only what is new.

    Args:
        save_dir: the run's folder.
        name, version: names of the two folders below it, as LDM runs have them.
        flush_logs_every_n_steps: rows held back at most.
    """

    def __init__(
        self, save_dir: str, name: str = "testtube", version: int | str = 0, flush_logs_every_n_steps: int = 20
    ) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._name = name
        self._version = version
        self._flush_every = max(1, flush_logs_every_n_steps)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._tail: set[tuple[int, frozenset[str]]] = set()

    @property
    def name(self) -> str:
        """First folder below the run's."""
        return self._name

    @property
    def version(self) -> int | str:
        """Number of the second folder."""
        return self._version

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """Folder of the CSV file."""
        version = self._version if isinstance(self._version, str) else f"version_{self._version}"
        return str(Path(self._save_dir) / self._name / version)

    @property
    def path(self) -> Path:
        """The CSV file."""
        return Path(self.log_dir) / "metrics.csv"

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows of an earlier part of the run up to, not including, ``step``."""
        rows = self._read()
        kept = [row for row in rows if row.get("step") and int(row["step"]) < step]
        last = max((int(row["step"]) for row in kept), default=-1)
        self._tail = {
            (last, frozenset(key for key, value in row.items() if value not in ("", None)))
            for row in kept
            if int(row["step"]) == last
        }
        if rows:
            self._rewrite(kept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one row; a row that an earlier part of the run already wrote is left as it is."""
        row = {key: float(value) for key, value in metrics.items()}
        row["step"] = -1 if step is None else step
        if (row["step"], frozenset(row)) in self._tail:
            return
        self._rows.append(row)
        if len(self._rows) >= self._flush_every:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the whole config is in the run's ``configs`` folder."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows held back."""
        if not self._rows:
            return
        if not self._columns and self.path.is_file():
            self._read()
        new = sorted({key for row in self._rows for key in row} - set(self._columns))
        if new or not self.path.is_file():
            earlier = self._read() if self.path.is_file() else []
            self._columns += new
            self._rewrite([*earlier, *self._rows])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self._columns).writerows(self._rows)
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            # A line cut short by a crash has fewer cells; it is dropped.
            rows = [row for row in reader if None not in row and None not in row.values()]
            self._columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with atomic_write(self.path) as stream:
            writer = csv.DictWriter(stream, self._columns, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(rows)


def build_loggers(choice: Any, folder: RunFolder, flush_every: int | None = None, **wandb: Any) -> list[Logger]:
    """Return the run's loggers: always the CSV file, plus what the config asks for.

    Args:
        choice: ``lightning.logger``: ``None`` (TensorBoard), a name, or ``{target, params}``.
        folder: the run's folder.
        flush_every: rows the CSV logger holds back.
        **wandb: arguments for Weights & Biases.
    """
    options = {} if flush_every is None else {"flush_logs_every_n_steps": int(flush_every)}
    loggers: list[Logger] = [MetricsCSVLogger(str(folder.path), **options)]
    if isinstance(choice, Mapping):
        params = {"save_dir": str(folder.path), **(choice.get("params") or {})}
        try:
            own = instantiate_from_config({"target": choice["target"], "params": params})
        except ModuleNotFoundError as error:  # a logger's own package is looked for only now
            raise UserError(
                f"lightning.logger: {choice['target']} cannot be made here ({str(error).partition(chr(10))[0]}): "
                "install what it needs, or leave the key out (lightning.logger=null)"
            ) from error
        return [own] if isinstance(own, MetricsCSVLogger) else [*loggers, own]
    if choice == "wandb":
        loggers.append(_wandb_logger(folder, wandb))
    elif choice in (None, "tensorboard"):
        loggers.append(TensorBoardLogger(str(folder.path), name="tensorboard", version=""))
    return loggers


def _wandb_logger(folder: RunFolder, options: dict[str, Any]) -> Logger:
    if importlib.util.find_spec("wandb") is None:
        raise UserError("lightning.logger: wandb needs the package wandb: pip install wandb, or leave the key out")
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(save_dir=str(folder.path), name=folder.path.name, id=folder.path.name, **options)
