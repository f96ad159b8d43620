"""How far, how fast, how well: a live bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class SpeedBar(ProgressBar):
    """Shows epoch, step, images per second, the share of time spent waiting for data, and the losses.

    Losses are read from the device only when something is shown.

    Args:
        refresh_rate: batches between two looks at the clock.
        line_seconds: seconds between two lines when the output is no terminal.
    """

    def __init__(self, refresh_rate: int = 1, line_seconds: float = 10.0) -> None:
        super().__init__()
        self.refresh_rate = max(1, refresh_rate)
        self.line_seconds = line_seconds
        self._enabled = True
        self._console = Console(stderr=True)
        self._live: Progress | None = None
        self._task: Any = None
        self._images = 0
        self._waited = 0.0
        self._shown_at = self._batch_ended_at = time.monotonic()

    def disable(self) -> None:
        """Show nothing (Lightning calls this in all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show something again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the live bar if there is a terminal."""
        self._shown_at = self._batch_ended_at = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[status]}"), console=self._console)
            self._live.start()
            self._task = self._live.add_task("", total=None, status="")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the bar back to the start of the epoch."""
        self._batch_ended_at = time.monotonic()
        if self._live is not None:
            total = self.total_train_batches
            self._live.reset(self._task, total=None if total == float("inf") else total)
            self._live.update(self._task, description=f"epoch {trainer.current_epoch}", status="")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting for data."""
        self._waited += time.monotonic() - self._batch_ended_at

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; show if it is time."""
        self._batch_ended_at = now = time.monotonic()
        self._images += _batch_size(batch) * trainer.world_size
        if not self._enabled or (batch_idx + 1) % self.refresh_rate:
            return
        if now - self._shown_at >= (0.5 if self._live else self.line_seconds):
            self._show(trainer, pl_module, batch_idx + 1, now)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the epoch's last figures if there is a bar; a log only gets lines at its own pace."""
        if self._live is not None:
            self._show(trainer, pl_module, trainer.fit_loop.batch_idx + 1, time.monotonic())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not count validation as waiting for data."""
        self._batch_ended_at = time.monotonic()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int, now: float) -> None:
        elapsed = max(now - self._shown_at, 1e-6)
        speed = f"{self._images / elapsed:.0f} images/s"
        if self._waited > 0.05 * elapsed:
            speed += f", {100 * min(1.0, self._waited / elapsed):.0f} % waiting for data"
        metrics = self.get_metrics(trainer, pl_module)
        losses = "  ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float) and name != "v_num"
        )
        if self._live is not None:
            self._live.update(self._task, completed=batches, status=f"{speed}  {losses}")
        else:
            total = self.total_train_batches
            logger.info("epoch %d  %s/%s  %s  %s", trainer.current_epoch, batches, total, speed, losses)
        self._images, self._waited, self._shown_at = 0, 0.0, now


def _batch_size(batch: Any) -> int:
    """Return how many images a batch holds; 0 when it does not say."""
    images = batch.get("image") if isinstance(batch, Mapping) else batch
    if isinstance(images, (list, tuple)) and images:
        images = images[0]
    return len(images) if hasattr(images, "__len__") else 0
