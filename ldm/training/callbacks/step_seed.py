"""Random numbers that depend on where training stands, not on how it got there."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

_TRAIN, _VALIDATE, _TEST = range(3)


class StepSeed(pl.Callback):
    """Reseeds torch, numpy and ``random`` at the start of every batch from (seed, batch counter, rank).

    A resumed run therefore draws the very noise the uninterrupted run would have drawn, with no generator state
    in the checkpoint; and every validation sees the same noise, so that its losses can be compared.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _reseed(self, stage: int, trainer: pl.Trainer, counter: int) -> None:
        words = np.random.SeedSequence([self.seed, stage, counter, trainer.global_rank]).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.manual_seed(int(words[2]))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed by the number of batches trained on so far, over all epochs."""
        self._reseed(_TRAIN, trainer, trainer.fit_loop.total_batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by the batch's place in the validation set."""
        self._reseed(_VALIDATE, trainer, batch_idx)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed by the batch's place in the test set."""
        self._reseed(_TEST, trainer, batch_idx)
