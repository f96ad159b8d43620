"""``last.ckpt`` kept fresh at step boundaries, and a clean stop on Ctrl-C, SIGTERM and errors."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from ldm.util import Interrupted, UserError

logger = logging.getLogger(__name__)

_STOP_SIGNALS = ("SIGINT", "SIGTERM")
_SAVE_SIGNALS = ("SIGUSR1",)


class LastCheckpoint(Checkpoint):
    """Rewrites ``last.ckpt`` every N steps, every T seconds, at the end of each epoch, and before stopping.

    It saves when the next batch is about to start: only then has everything that belongs to the step before
    happened, the module's own ``on_train_batch_end`` (moving averages) included, so that a resumed run computes
    what the uninterrupted one would have computed.

    Args:
        path: the file to rewrite.
        every_n_train_steps: steps between two saves; ``None`` for no such rule.
        interval_seconds: seconds between two saves; ``None`` for no such rule.
    """

    def __init__(
        self, path: str, every_n_train_steps: int | None = None, interval_seconds: float | None = 600.0
    ) -> None:
        self.path = Path(path)
        self.every_n_train_steps = every_n_train_steps
        self.interval_seconds = interval_seconds
        self.saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._boundary_step = 0
        self._stop_signal = 0
        self._save_requested = False
        self._old_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals; only the main thread may."""
        self._saved_at = time.monotonic()
        self._boundary_step = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        for names, handler in ((_STOP_SIGNALS, self._on_stop_signal), (_SAVE_SIGNALS, self._on_save_signal)):
            for name in names:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1
                if number is not None:
                    self._old_handlers[number] = signal.signal(number, handler)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal:
            raise KeyboardInterrupt
        self._stop_signal = number
        logger.warning("stopping after this step and saving %s; once more to stop at once", self.path)

    def _on_save_signal(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; stop if a signal came."""
        self._boundary_step = trainer.global_step
        stop = self._agreed(trainer, bool(self._stop_signal))
        if stop or self._agreed(trainer, self._is_due(trainer)):
            with _between_batches(trainer):
                self._save(trainer)
        if stop:
            raise Interrupted(self._stop_signal or signal.SIGTERM)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of every epoch; stop if a signal came."""
        self._boundary_step = trainer.global_step
        self._save(trainer)
        if self._agreed(trainer, bool(self._stop_signal)):
            raise Interrupted(self._stop_signal or signal.SIGTERM)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what is whole: not after a broken model, a failed save, or half a step."""
        is_ours = isinstance(exception, (Interrupted, UserError, KeyboardInterrupt))
        is_whole = trainer.training and trainer.global_step == self._boundary_step
        if is_ours or not is_whole or trainer.global_step in (0, self.saved_step) or trainer.world_size > 1:
            return
        with _between_batches(trainer):
            self._save(trainer)
        logger.error("saved %s at step %d before giving up", self.path, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def _is_due(self, trainer: pl.Trainer) -> bool:
        steps = trainer.fit_loop.epoch_loop.batch_progress.total.completed // trainer.accumulate_grad_batches
        if steps == 0 or self.saved_step == trainer.global_step:
            return False
        if self._save_requested:
            return True
        if self.every_n_train_steps and steps % self.every_n_train_steps == 0:
            return True
        return self.interval_seconds is not None and time.monotonic() - self._saved_at >= self.interval_seconds

    @staticmethod
    def _agreed(trainer: pl.Trainer, decision: bool) -> bool:
        """Saving is collective: with several processes one yes is a yes for all."""
        if trainer.world_size == 1:
            return decision
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        for run_logger in trainer.loggers:
            run_logger.save()
        self.saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._save_requested = False


@contextlib.contextmanager
def _between_batches(trainer: pl.Trainer) -> Iterator[None]:
    """Let the loop's counters say "the last batch is done and the next one not begun" while saving."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    trackers = (progress.total, progress.current)
    before = [(tracker.ready, tracker.started, tracker.processed) for tracker in trackers]
    was_last = progress.is_last_batch
    for tracker in trackers:
        tracker.ready = tracker.started = tracker.processed = tracker.completed
    progress.is_last_batch = False
    try:
        yield
    finally:
        progress.is_last_batch = was_last
        for tracker, counts in zip(trackers, before):
            tracker.ready, tracker.started, tracker.processed = counts
