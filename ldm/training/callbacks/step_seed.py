"""Random numbers that depend on seed and step, not on interruptions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

_TRAIN, _VALIDATE, _TEST = range(3)


class StepSeed(Callback):
    """Reseeds torch, numpy and ``random`` at the start of every batch from (seed, batch counter, rank).

    A resumed run therefore draws the same noise as an uninterrupted one, without generator states in the checkpoint,
    and all validations draw the same noise, so that their losses are comparable.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _reseed(self, stage: int, trainer: Trainer, counter: int) -> None:
        words = np.random.SeedSequence([self.seed, stage, counter, trainer.global_rank]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        if trainer.strategy.root_device.type == "cpu":  # torch.manual_seed formats the call stack for unused devices
            torch.default_generator.manual_seed(int(words[2]))
        else:
            torch.manual_seed(int(words[2]))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed by the number of training batches so far, over all epochs."""
        self._reseed(_TRAIN, trainer, trainer.fit_loop.total_batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by the index of the batch in the validation set."""
        self._reseed(_VALIDATE, trainer, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by the index of the batch in the test set."""
        self._reseed(_TEST, trainer, batch_idx)
