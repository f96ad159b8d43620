"""Duration and peak memory of each training epoch on a CUDA device."""

from __future__ import annotations

import logging
import time

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


class CUDACallback(Callback):
    """Logs the duration and the peak of allocated memory of every training epoch; does nothing on other devices."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the clock and the peak."""
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the maximum of duration and memory over all processes."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        figures = (torch.cuda.max_memory_allocated(device) / 2**20, time.monotonic() - self._started)
        peak, seconds = (trainer.strategy.reduce(torch.tensor(x, device=device), reduce_op="max") for x in figures)
        if trainer.is_global_zero:
            logger.info("epoch %d: %.1f s, peak memory %.0f MiB", trainer.current_epoch, seconds, peak)
