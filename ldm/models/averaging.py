"""Moving average of a model's weights: the callback that updates it, and averages in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from ldm.modules.ema import LitEma
from ldm.modules.weights import EMA_PREFIX

logger = logging.getLogger(__name__)


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


def without_foreign_average(state: Mapping[str, Tensor], average: LitEma | None) -> Mapping[str, Tensor]:
    """Return a checkpoint's state dict without its average, unless that has all weights of ``average``."""
    found = {key for key in state if key.startswith(EMA_PREFIX)}
    has_weights = bool(found - {f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"})  # not so in some published files
    if has_weights:
        if average is None or {EMA_PREFIX + name for name in average.state_dict()} <= found:
            return state
        logger.warning("the checkpoint averages other weights than this model: a new average is started")
    return {key: value for key, value in state.items() if key not in found}
