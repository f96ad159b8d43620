"""Numbered checkpoints between two batches."""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import LightningModule, Trainer

from ldm.training.callbacks.last_checkpoint import between_batches


class ModelCheckpoint(pl.callbacks.ModelCheckpoint):
    """Lightning's callback, which writes the files of every N steps or seconds before the next batch.

    Lightning writes them within the batch, before its metrics are logged, and, if the run was resumed, also within an
    accumulation window. The name of the class is a key of checkpoints.
    """

    _is_pending = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; the best files of a moved run are those of its new folder, if all of them are there."""
        old, new = (f"{folder}{os.sep}" for folder in (state_dict.get("dirpath"), self.dirpath))
        paths = {key: path.replace(old, new) for key, path in state_dict.items() if key.endswith("_path")}
        best = {path.replace(old, new): score for path, score in state_dict.get("best_k_models", {}).items()}
        if all(map(os.path.exists, best)):
            state_dict = {**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Postpone the file of a step, except at the end of an epoch."""
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        else:
            self._is_pending = not trainer.fit_loop._should_accumulate()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the file of the last step, if due."""
        if self._is_pending:
            self._is_pending = False
            with between_batches(trainer):
                super().on_train_batch_end(trainer, pl_module, None, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file of the last step, if the run ends within an epoch, and that of the epoch."""
        self.on_train_batch_start(trainer, pl_module, None, trainer.fit_loop.batch_idx)
        super().on_train_epoch_end(trainer, pl_module)
