"""Accumulation windows: the batches of one optimizer step, which no validation, checkpoint or stop divides."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop


class WindowLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which validates and stops at the ends of windows only.

    Lightning has no public option for it. Otherwise checkpoints of validations would lack the gradients of a part of a
    window.
    """

    _start = 0  # batches of this epoch before it was resumed
    _is_validation_due = False

    @property
    def done(self) -> bool:
        """Whether the epoch ends here."""
        return super().done and (self._is_training_done or not self._should_accumulate())

    def reset(self) -> None:
        """Prepare a new or resumed epoch."""
        super().reset()
        self._start = self.batch_progress.current.ready

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        """Return whether to validate, or, before the first batch of a resumed epoch, whether that has been done."""
        uncounted = self.global_step - self._batches_that_stepped
        if self.restarted_on_last and self.batch_progress.current.ready == self._start and uncounted in (0, 1):
            # Lightning counts the step of the last batch again if it believes that the checkpoint is of a validation.
            return bool(uncounted)
        self._is_validation_due |= super()._should_check_val_fx(data_fetcher)
        if self._should_accumulate():
            return False
        is_due, self._is_validation_due = self._is_validation_due, False
        return is_due


class AccumulationWindows(Callback):
    """Counts optimizer steps for modules with manual optimization too, and logs once per step.

    Lightning refuses ``accumulate_grad_batches`` with manual optimization. It is set after Lightning's check, so that
    loops, loggers and callbacks have one number of batches per step.

    Args:
        num_batches: batches of an optimizer step.
    """

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches
        self._log_every = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the number of batches of a step."""
        self._log_every = trainer.log_every_n_steps
        if stage == "fit":
            trainer.accumulate_grad_batches = self.num_batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch loggers off within a window; a step has one row."""
        trainer.log_every_n_steps = 0 if trainer.fit_loop._should_accumulate() else self._log_every
