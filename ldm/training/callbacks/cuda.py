"""Time and peak memory of each epoch on a CUDA device."""

from __future__ import annotations

import logging
import time

import pytorch_lightning as pl
import torch

logger = logging.getLogger(__name__)


class CUDACallback(pl.Callback):
    """Logs seconds and the peak of allocated memory of every training epoch; silent on other devices."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and forget the earlier peak."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the slowest and largest process needed."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        peak = torch.tensor(torch.cuda.max_memory_allocated(device) / 2**20, device=device)
        seconds = torch.tensor(time.monotonic() - self._started, device=device)
        peak = trainer.strategy.reduce(peak, reduce_op="mean")
        seconds = trainer.strategy.reduce(seconds, reduce_op="mean")
        if trainer.is_global_zero:
            logger.info("epoch %d: %.1f s, peak memory %.0f MiB", trainer.current_epoch, seconds, peak)
