"""Base class of callbacks that act on the test pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from ldm.data.module import DataModuleFromConfig
from ldm.diffusion.noise import kept_random_state
from ldm.runs.records import update_results
from ldm.util import UserError

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far weights were trained: index of the last epoch, and number of optimizer steps."""

    epoch: int
    step: int


class TestPassCallback(pl.Callback):
    """Callback with access to the run folder, the test data set and the progress of the tested weights."""

    __test__ = False  # keeps pytest from collecting it
    _loaded: Progress | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the progress of an earlier checkpoint."""
        self._loaded = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the progress of a tested checkpoint; Lightning does not restore it for testing."""
        if trainer.state.fn == TrainerFn.TESTING:
            self._loaded = Progress(int(checkpoint["epoch"]), int(checkpoint["global_step"]))

    def progress(self, trainer: pl.Trainer) -> Progress:
        """Return the progress of the tested weights, equal to that in their checkpoint's name."""
        if self._loaded is None and trainer.global_step == 0 and trainer.ckpt_path:
            # Lightning does not call on_load_checkpoint for checkpoints saved with ``save_weights_only``.
            checkpoint = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)
            self._loaded = Progress(int(checkpoint["epoch"]), int(checkpoint["global_step"]))
        return self._loaded or Progress(max(0, trainer.current_epoch - 1), trainer.global_step)

    @staticmethod
    def run_dir(trainer: pl.Trainer) -> Path:
        """Return the run folder."""
        return Path(trainer.default_root_dir)

    def publish(self, trainer: pl.Trainer, **figures: Any) -> None:
        """Write figures to ``results.json``, and numbers among them to the loggers as ``figure/<name>``."""
        update_results(self.run_dir(trainer), **figures)
        numbers = {f"figure/{name}": value for name, value in figures.items() if isinstance(value, (int, float))}
        for each in trainer.loggers:
            each.log_metrics(numbers, step=self.progress(trainer).step)

    @staticmethod
    def test_loader(trainer: pl.Trainer) -> DataLoader:
        """Return the test loader.

        Raises:
            UserError: there are several.
        """
        loader = trainer.test_dataloaders
        if isinstance(loader, (list, tuple, dict)):
            raise UserError(f"test pass: expected one test data set, got {len(loader)}. Set one data.params.test")
        return loader

    def is_whole(self, trainer: pl.Trainer) -> bool:
        """Return whether this process sees the whole test set; log a warning if it does not."""
        if trainer.world_size > 1:
            reason = (
                f"expected a test pass on one device, got {trainer.world_size} processes. Rerun it on one device: "
                "python main.py -r <run> lightning.trainer.devices=1"
            )
        elif sum(trainer.num_test_batches) < len(self.test_loader(trainer)):
            reason = "the trainer stops before the end of the test set"
        else:
            return True
        if trainer.is_global_zero:
            logger.warning("%s: nothing is written: %s", type(self).__name__, reason)
        return False


class SampleScore(TestPassCallback):
    """Callback that scores samples of a model at the end of the test pass."""

    scores_samples = True
    _is_checked = False

    def check(self, dataset: Any, model: pl.LightningModule) -> None:
        """Raise if the score of a model cannot be computed on the test data set, and load what it needs."""
        raise NotImplementedError(f"{type(self).__name__} must implement check()")

    def check_run(self, data: DataModuleFromConfig, model: pl.LightningModule) -> None:
        """Check before training that the score can be computed after it; the test pass uses the same data set."""
        if "test" in data.dataset_configs:
            self.check(data.dataset("test"), model)
            self._is_checked = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the first step, unless it was done."""
        data = trainer.datamodule
        if isinstance(data, DataModuleFromConfig) and not (trainer.fast_dev_run or self._is_checked):
            with kept_random_state(pl_module.device):  # training draws the same numbers as without the check
                self.check_run(data, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the long test pass that the score can be computed."""
        self.check(self.test_loader(trainer).dataset, pl_module)
