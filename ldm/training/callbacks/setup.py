"""The run's own record: ``run.json`` kept up to date, and a copy of it in every checkpoint."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.runs.folder import update_run, utc_now
from ldm.training.loggers import MetricsCSVLogger

logger = logging.getLogger(__name__)


class SetupCallback(pl.Callback):
    """Writes ``run.json`` when training starts and at each checkpoint; puts the record into checkpoints.

    Args:
        run_dir: the run's folder.
        record: plain entries known before training: name, seed, versions, command, fingerprint, ...
        config: the whole resolved config as plain containers.
        earlier_seconds: how long earlier parts of a resumed run took.
    """

    def __init__(
        self, run_dir: str, record: Mapping[str, Any], config: Mapping[str, Any], earlier_seconds: float = 0.0
    ) -> None:
        self.run_dir = Path(run_dir)
        self.record = copy.deepcopy(dict(record))
        self.config = copy.deepcopy(dict(config))
        self._earlier = earlier_seconds
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run took so far, earlier parts included."""
        return round(self._earlier + time.monotonic() - self._started, 1)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the record once the processes know their ranks."""
        if trainer.is_global_zero and stage == "fit":
            update_run(self.run_dir, **self.record, status="running", finished=None, seconds=self.seconds)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how large the model is and, after resuming, where; let the CSV file go on from there."""
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained, total = sum(n for n, needed in sizes if needed), sum(n for n, _ in sizes)
        logger.info("%s: %s parameters, %s of them trained", type(pl_module).__name__, f"{total:,}", f"{trained:,}")
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning gives to its loggers
        for run_logger in trainer.loggers:
            if isinstance(run_logger, MetricsCSVLogger):
                run_logger.continue_from(steps)
        if trainer.ckpt_path:
            place = (trainer.global_step, trainer.current_epoch, trainer.ckpt_path)
            logger.info("resumed at step %d, epoch %d, from %s", *place)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Files of Lightning 1.4 do not count what the order of the data, logs and pictures go by: count for them."""
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
        batches = fit_loop.get("epoch_loop.batch_progress", {}).get("total", {})
        if any(batches.values()):
            return
        steps = checkpoint["global_step"]
        accumulated = getattr(pl_module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        batches.update(dict.fromkeys(batches, steps * accumulated))
        fit_loop.get("epoch_loop.state_dict", {})["_batches_that_stepped"] = steps

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record and the config, so that a checkpoint explains itself."""
        checkpoint["run"] = {**self.record, "config": self.config}
        if trainer.is_global_zero:
            update_run(self.run_dir, seconds=self.seconds, global_step=trainer.global_step)

    def close(self, status: str) -> None:
        """Write how the run ended: finished, failed or interrupted."""
        update_run(self.run_dir, status=status, finished=utc_now(), seconds=self.seconds)
