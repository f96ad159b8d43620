"""Detection of NaN and infinity before they reach a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from ldm.data.collate import ITEM_NAMES
from ldm.util import UserError


class NonFiniteGuard(Callback):
    """Stops training at the first non-finite loss or weight, and names the item if its data are not finite.

    Loss and batch are checked on the device; the result is transferred only every ``log_every_n_steps`` batches.

    Args:
        checkpoints: folder of the run's checkpoints.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = Path(checkpoints)
        self._first_bad: Tensor | None = None
        self._bad_items: dict[str, Tensor] = {}  # entry -> first item that is not finite in the first bad batch, or -1
        self._names: dict[int, Any] = {}  # step -> names of the items, since the last check

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, and the items that are not finite, if the loss is not finite."""
        entries, step = batch if isinstance(batch, Mapping) else {}, trainer.fit_loop.epoch_loop._batches_that_stepped
        self._names[step] = next((entries[name] for name in ITEM_NAMES if name in entries), None)
        for value in outputs.values() if isinstance(outputs, Mapping) else (outputs,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._record(value.detach(), step, entries)
        if trainer.log_every_n_steps and (batch_idx + 1) % trainer.log_every_n_steps == 0:  # 0 within a step
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the losses of the epoch."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop instead of saving non-finite weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._check(trainer)
        trained = [parameter.detach() for parameter in pl_module.parameters() if parameter.requires_grad]
        if trained and not torch.isfinite(torch.nn.utils.get_total_norm(trained)):
            names = [name for name, value in pl_module.named_parameters() if not torch.isfinite(value).all()]
            if names:
                self._stop(
                    trainer, trainer.fit_loop.epoch_loop._batches_that_stepped, f"weights {', '.join(names[:5])}"
                )

    def _record(self, value: Tensor, step: int, batch: Mapping[str, Any]) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.long, device=value.device)
        is_new = ~torch.isfinite(value).all() & (self._first_bad < 0)
        self._first_bad = torch.where(is_new, step, self._first_bad)
        for key, entry in batch.items():
            if isinstance(entry, Tensor) and entry.is_floating_point() and entry.ndim:
                is_bad = ~torch.isfinite(entry).flatten(1).all(dim=1) if entry.ndim > 1 else ~torch.isfinite(entry)
                item = torch.where(is_bad.any(), is_bad.int().argmax(), -1).to(value.device)
                self._bad_items[key] = torch.where(is_new, item, self._bad_items.get(key, -1))

    def _check(self, trainer: Trainer) -> None:
        if self._first_bad is not None and self._first_bad.item() >= 0:
            step = int(self._first_bad.item())
            for key, item in self._bad_items.items():
                if item >= 0:
                    names = self._names.get(step)
                    name = "" if names is None else f" ({names[int(item)]})"
                    raise UserError(
                        f"NaN or infinity in the data at step {step} (epoch {trainer.current_epoch}): {key!r} of item "
                        f"{int(item)} of the batch{name}. Correct the file or the data set, then start again"
                    )
            terms = [
                f"{name}={float(value):.4g}"
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train") and not torch.isfinite(value).all()
            ]
            self._stop(trainer, step, "the loss" + (f" ({', '.join(terms)})" if terms else ""))
        self._names.clear()

    def _stop(self, trainer: Trainer, step: int, what: str) -> None:
        saved = sorted(self.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        advice = "There is no checkpoint yet. Start again"
        if saved:
            resume = f"python main.py -r {self.checkpoints.parent} -t"
            advice = f"The newest checkpoint is {saved[-1]}. Continue from it: {resume}"
        raise UserError(
            f"NaN or infinity at step {step} (epoch {trainer.current_epoch}): {what}. {advice} with a smaller "
            "learning rate (model.base_learning_rate=...) or with lightning.trainer.gradient_clip_val=1.0"
        )
