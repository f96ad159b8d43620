"""When the moving average of a model's weights moves."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

from ldm.modules.ema import LitEma


class AverageWeights(pl.Callback):
    """Moves the average along after every training batch, accumulated ones included (as in LDM).

    A callback and not the model's own hook: Lightning runs callbacks first and checkpoints last among them, so
    that a checkpoint holds the average of the very step it is named after.

    Args:
        average: the moving average.
        network: what it averages.
    """

    def __init__(self, average: LitEma, network: nn.Module) -> None:
        self._average, self._network = average, network

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average towards the network."""
        self._average(self._network)
