"""Callback that updates the moving average of a model's weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import nn

from ldm.modules.ema import LitEma


class AverageWeights(pl.Callback):
    """Updates the moving average after every training batch, including accumulated ones, as in LDM.

    It is a callback instead of a hook of the model, because Lightning runs callbacks before hooks and checkpoint
    callbacks last: a checkpoint therefore contains the average of the step that it is named after.

    Args:
        average: the moving average.
        network: the averaged network.
    """

    def __init__(self, average: LitEma, network: nn.Module) -> None:
        self._average, self._network = average, network

    def on_train_batch_end(self, *_: Any) -> None:
        """Update the average."""
        self._average(self._network)
