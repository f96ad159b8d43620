"""Regular writes of ``last.ckpt`` at step boundaries, and a clean stop on Ctrl-C, SIGTERM and errors."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from ldm.util import Interrupted, UserError

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Rewrites ``last.ckpt`` every N steps, every T seconds, at the end of each epoch, and before stopping.

    It saves at the start of the first batch of a step, after all hooks of the step before (moving averages included),
    so that a resumed run computes the same values as an uninterrupted one.

    Args:
        path: the checkpoint file.
        every_n_train_steps: optimizer steps between two saves; ``None`` disables this rule.
        interval_seconds: seconds between two saves; ``None`` disables this rule.
    """

    def __init__(
        self, path: str, every_n_train_steps: int | None = None, interval_seconds: float | None = 600.0
    ) -> None:
        self.path = Path(path)
        self.every_n_train_steps = every_n_train_steps
        self.interval_seconds = interval_seconds
        self._advice = f". Continue with: python main.py -r {shlex.quote(str(self.path.parent.parent))} -t"
        self.saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._boundary_step = 0
        self._stop_signal = 0
        self._save_requested = False
        self._old_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, which is possible in the main thread only."""
        self._saved_at = time.monotonic()
        self._boundary_step = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        stop, save = self._on_stop_signal, self._on_save_signal
        for name, handler in {"SIGINT": stop, "SIGTERM": stop, "SIGHUP": stop, "SIGUSR1": save}.items():
            if name not in signal.Signals.__members__:  # Windows has neither SIGHUP nor SIGUSR1
                continue
            number = signal.Signals[name]
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                self._old_handlers[number] = signal.signal(number, handler)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal and number == signal.SIGINT:  # batch systems send SIGTERM to every process, recipes too
            raise KeyboardInterrupt
        self._stop_signal = number
        logger.warning("stopping after this step and saving %s; interrupt again to stop immediately", self.path)

    def _on_save_signal(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first batch of a step: save if due; stop if a signal was received."""
        if not _is_between_steps(trainer):
            return
        self._boundary_step = trainer.global_step
        stop = self._agreed(trainer, bool(self._stop_signal))
        if stop or self._agreed(trainer, self._is_due(trainer)):
            with between_batches(trainer):
                self._save(trainer)
        if stop:
            raise Interrupted(self._stop_signal or signal.SIGTERM, self._advice)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of every epoch; stop if a signal was received."""
        self._boundary_step = trainer.global_step
        self._save(trainer)
        if self._agreed(trainer, bool(self._stop_signal)):
            raise Interrupted(self._stop_signal or signal.SIGTERM, self._advice)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save unless the error is ours, or occurred after the first batch of a step or in a save."""
        is_ours = isinstance(exception, (Interrupted, UserError, KeyboardInterrupt))
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        is_whole = trainer.training and trainer.global_step == self._boundary_step and _is_between_steps(trainer)
        is_whole = is_whole and batches.processed == batches.completed  # no callback has seen the batch
        if is_ours or not is_whole or trainer.global_step in (0, self.saved_step) or trainer.world_size > 1:
            return
        with between_batches(trainer):
            self._save(trainer)
        logger.error("saved %s at step %d because of an error", self.path, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def _is_due(self, trainer: Trainer) -> bool:
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped  # global_step counts every optimizer
        if steps == 0 or self.saved_step == trainer.global_step:
            return False
        if self._save_requested or (self.every_n_train_steps and steps % self.every_n_train_steps == 0):
            return True
        return self.interval_seconds is not None and time.monotonic() - self._saved_at >= self.interval_seconds

    @staticmethod
    def _agreed(trainer: Trainer, decision: bool) -> bool:
        """Return whether any process decided so; saving is collective."""
        return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        for run_logger in trainer.loggers:
            run_logger.save()
        self.saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._save_requested = False


def _is_between_steps(trainer: Trainer) -> bool:
    """Return whether the completed batches of the epoch are whole accumulation windows."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches == 0


@contextlib.contextmanager
def between_batches(trainer: Trainer) -> Iterator[None]:
    """Set the counters of the loop to the state after a batch and before the next one while saving."""
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
