"""What callbacks of the test pass share: how far the tested weights were trained, and whether to run at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from ldm.util import UserError

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far the weights under test were trained: index of the last epoch, number of optimizer steps."""

    epoch: int
    step: int


class TestPassCallback(pl.Callback):
    """Knows the run folder, the data set under test and the progress of the weights under test."""

    __test__ = False  # not a test class, whatever its name makes pytest believe
    _loaded: Progress | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier checkpoint: the weights move on now."""
        self._loaded = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember where a tested checkpoint stands, since Lightning does not restore it for testing."""
        if trainer.state.fn == TrainerFn.TESTING:
            self._loaded = Progress(int(checkpoint["epoch"]), int(checkpoint["global_step"]))

    def progress(self, trainer: pl.Trainer) -> Progress:
        """Progress of the weights under test; agrees with the name of the checkpoint they are saved in."""
        if self._loaded is None and trainer.global_step == 0 and trainer.ckpt_path:
            # Lightning does not show callbacks a checkpoint saved with ``save_weights_only``
            checkpoint = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)
            self._loaded = Progress(int(checkpoint["epoch"]), int(checkpoint["global_step"]))
        return self._loaded or Progress(max(0, trainer.current_epoch - 1), trainer.global_step)

    @staticmethod
    def run_dir(trainer: pl.Trainer) -> Path:
        """The run's folder."""
        return Path(trainer.default_root_dir)

    @staticmethod
    def test_loader(trainer: pl.Trainer) -> DataLoader:
        """The one test loader.

        Raises:
            UserError: There are several.
        """
        loader = trainer.test_dataloaders
        if isinstance(loader, (list, tuple, dict)):
            raise UserError(f"The test pass expects one test data set, found {len(loader)}: set one data.params.test.")
        return loader

    def is_whole(self, trainer: pl.Trainer) -> bool:
        """Whether this process sees the whole test set; says what is left out when it does not."""
        what = type(self).__name__
        if trainer.world_size > 1:
            if trainer.is_global_zero:
                log.warning(
                    "%s needs the test pass on one device, found %d processes: nothing is written. Run the test again "
                    "with one device: python main.py -r <run> lightning.trainer.devices=1",
                    what,
                    trainer.world_size,
                )
            return False
        if sum(trainer.num_test_batches) < len(self.test_loader(trainer)):
            log.warning("%s writes nothing: the trainer was told to stop before the end of the test set.", what)
            return False
        return True
