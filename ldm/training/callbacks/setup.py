"""The record of a run in ``run.json`` and in every checkpoint, and the start of training."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.legacy.optimizers import fit_optimizer_state
from ldm.runs.records import update_run, utc_now
from ldm.training.loggers import MetricsCSVLogger
from ldm.training.schedules import late_schedules

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Updates ``run.json`` at the first step and at each checkpoint, and adds the record to checkpoints.

    A run that fails before its first step, such as a finished one that is continued with a wrong setting, keeps its
    record and its configs. At the start of training the callback also logs the size of the model and warns of schedules
    that have no effect.

    Args:
        run_dir: folder of the run.
        record: plain entries: name, seed, versions, command, fingerprint, ...
        config: the resolved config as plain containers.
        earlier_seconds: duration of earlier parts of a resumed run.
        on_begin: called once, before the record is written at the first step.

    Attributes:
        has_begun: whether the first step has begun, or training has ended without one.
    """

    def __init__(
        self,
        run_dir: str,
        record: Mapping[str, Any],
        config: Mapping[str, Any],
        earlier_seconds: float = 0.0,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.record = copy.deepcopy(dict(record))
        self.config = copy.deepcopy(dict(config))
        self._earlier, self._on_begin, self.has_begun = earlier_seconds, on_begin, False
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Duration of the run so far, earlier parts included."""
        return round(self._earlier + time.monotonic() - self._started, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the record at the first step, after everything is built and loaded."""
        if trainer.is_global_zero:
            self._begin()

    def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._on_begin()
            update_run(self.run_dir, **self.record, status="running", finished=None, seconds=self.seconds)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Map optimizer states of other layouts when they are loaded."""
        for optimizer in trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(fit_optimizer_state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the size of the model and the step of a resumed run; continue the CSV file from that step."""
        for message in late_schedules(self.config.get("model") or {}, planned_steps(trainer)):
            logger.warning("%s", message)
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        logger.info("%s: %s parameters, %s of them trained", type(pl_module).__name__, f"{total:,}", f"{trained:,}")
        # Checkpoints of a validation lack the step before it in Lightning's count for loggers.
        steps = min(trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped + 1)
        for run_logger in trainer.loggers:
            if isinstance(run_logger, MetricsCSVLogger):
                run_logger.continue_from(steps)
        if trainer.ckpt_path:
            position = (trainer.global_step, trainer.current_epoch, trainer.ckpt_path)
            logger.info("resumed at step %d, epoch %d, from %s", *position)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the batch counters, which files of Lightning 1.4 lack, for the order of data, logs and pictures."""
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
        batches = fit_loop.get("epoch_loop.batch_progress", {}).get("total", {})
        if any(batches.values()):
            return
        steps = checkpoint["global_step"]
        batches.update(dict.fromkeys(batches, steps * trainer.accumulate_grad_batches))
        fit_loop.get("epoch_loop.state_dict", {})["_batches_that_stepped"] = steps

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record and the config to the checkpoint."""
        checkpoint["run"] = {**self.record, "config": self.config}
        if trainer.is_global_zero:
            self._begin()
            update_run(self.run_dir, seconds=self.seconds, global_step=trainer.global_step)

    def close(self, status: str) -> None:
        """Write the outcome of the run: finished, failed or interrupted; not that of a failure before the first step.

        If it cannot be written, a warning is logged, so that the error that ended the run is reported.
        """
        try:
            if status == "finished":
                self._begin()
            if self.has_begun:
                update_run(self.run_dir, status=status, finished=utc_now(), seconds=self.seconds)
        except OSError as error:
            logger.warning("%s: the status %r could not be written (%s)", self.run_dir, status, error)


def planned_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of the whole run; infinity if it has no limit."""
    steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
    if (trainer.max_epochs or -1) > 0:
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        steps = min(steps, trainer.max_epochs * (batches if batches == math.inf else math.ceil(batches)))
    return steps
