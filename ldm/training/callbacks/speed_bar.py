"""Progress of training: a live bar in a terminal, or log lines at intervals."""

from __future__ import annotations

import datetime
import logging
import math
import sys
import time
from collections.abc import Mapping, Sized
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.training.callbacks.setup import planned_steps
from ldm.training.throughput import Throughput, measure_peak, precision_dtype

logger = logging.getLogger(__name__)


class SpeedBar(ProgressBar):
    """Shows epoch, step, images per second, share of the peak, waiting for data, time left, and the losses.

    Losses are transferred from the device only when they are shown. At the end of training the means of the speed are
    logged.

    Args:
        refresh_rate: batches between two checks of the clock.
        line_seconds: seconds between two log lines, over epochs and validations, if the output is not a terminal.

    Attributes:
        operations_per_image: of a training step, see ``ldm.training.throughput``; ``None`` if they are not known.
    """

    operations_per_image: float | None = None

    def __init__(self, refresh_rate: int = 1, line_seconds: float = 10.0) -> None:
        super().__init__()
        self.refresh_rate = max(1, refresh_rate)
        self.line_seconds = line_seconds
        self._enabled = True
        self._console = Console(stderr=True)
        self._live: Progress | None = None
        self._task: Any = None
        self._first_step, self._total, self._validated = 0, 0.0, 0.0
        self._speed, self._whole = Throughput(), Throughput()
        self._peak: float | None = None  # of all devices, operations per second
        self._started_at = self._shown_at = self._batch_ended_at = time.monotonic()

    def disable(self) -> None:
        """Disable the output (called by Lightning in all processes except the first)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the live bar if the output is a terminal."""
        self._started_at = self._shown_at = self._batch_ended_at = time.monotonic()
        self._validated = 0.0  # without the sanity validation
        self._first_step, self._total = trainer.global_step, planned_steps(trainer)
        if self._enabled and sys.stderr.isatty():
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[status]}"), console=self._console)
            self._live.start()
            total = None if self._total == math.inf else self._total
            self._task = self._live.add_task("", total=total, completed=self._first_step, status="")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time between two epochs."""
        self._batch_ended_at = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time since the last batch to the time spent waiting for data."""
        self._speed.waited += time.monotonic() - self._batch_ended_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; update the output if due."""
        self._batch_ended_at = now = time.monotonic()
        self._speed.images += num_images(batch) * trainer.world_size
        self._speed.batches += 1
        is_checked = self._enabled and self._speed.batches % self.refresh_rate == 0
        if is_checked and now - self._shown_at >= (0.5 if self._live else self.line_seconds):
            self._show(trainer, pl_module, now)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the final values of the epoch in the live bar."""
        if self._live is not None:
            self._show(trainer, pl_module, time.monotonic())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude the validation from the images per second."""
        now = time.monotonic()
        self._validated += now - self._batch_ended_at
        self._batch_ended_at = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means of the speed, without validations."""
        self._close()
        self._end_part(time.monotonic())
        speed = self._whole.describe(self.operations_per_image, self._peak)
        if self._enabled and speed:
            logger.info("trained %d batches: %s", self._whole.batches, speed)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the live bar."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the live bar."""
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        part = self._end_part(now)
        if self.operations_per_image is not None and self._peak is None:
            dtype = precision_dtype(trainer.precision)
            self._peak = measure_peak(pl_module.device, dtype) * trainer.world_size
            self._shown_at = time.monotonic()  # without the measurement
        speed = part.describe(self.operations_per_image, self._peak)
        metrics = {key: x for key, x in self.get_metrics(trainer, pl_module).items() if isinstance(x, float)}
        losses = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "v_num")
        if self._live is not None:
            status = {"description": f"epoch {trainer.current_epoch}", "status": f"{speed}  {losses}"}
            self._live.update(self._task, completed=trainer.global_step, **status)
        else:
            where = trainer.current_epoch, trainer.global_step, "?" if self._total == math.inf else int(self._total)
            logger.info("epoch %d  step %s/%s  %s%s  %s", *where, speed, self._left(trainer.global_step, now), losses)

    def _end_part(self, now: float) -> Throughput:
        """Return the speed since the last call, and add it to that of the whole training."""
        part, self._speed = self._speed, Throughput()
        part.seconds = max(0.0, now - self._shown_at - self._validated)
        self._whole += part
        self._validated, self._shown_at = 0.0, now
        return part

    def _left(self, step: int, now: float) -> str:
        """Return the time left, at the speed of this part of the run."""
        done = step - self._first_step
        if done <= 0 or self._total == math.inf:
            return ""
        seconds = (now - self._started_at) / done * max(0.0, self._total - step)
        return f"  {datetime.timedelta(seconds=round(seconds))} left"


def num_images(batch: Any) -> int:
    """Return the number of images of a batch; 0 if it is unknown."""
    images = batch.get("image", batch.get("index")) if isinstance(batch, Mapping) else batch
    if isinstance(images, (list, tuple)) and images:
        images = images[0]
    return len(images) if isinstance(images, Sized) else 0
