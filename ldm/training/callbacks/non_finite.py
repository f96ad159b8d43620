"""Detection of NaN and infinity before they reach a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from ldm.util import UserError


class NonFiniteGuard(Callback):
    """Stops training at the first non-finite loss or weight.

    The loss is checked on the device; the result is transferred only every ``log_every_n_steps`` batches.

    Args:
        checkpoints: folder of the run's checkpoints.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = Path(checkpoints)
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step if the loss is not finite."""
        for value in outputs.values() if isinstance(outputs, Mapping) else (outputs,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._record(value.detach(), trainer.fit_loop.epoch_loop._batches_that_stepped)
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

    def _record(self, value: Tensor, step: int) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.long, device=value.device)
        is_new = ~torch.isfinite(value).all() & (self._first_bad < 0)
        self._first_bad = torch.where(is_new, step, self._first_bad)

    def _check(self, trainer: Trainer) -> None:
        if self._first_bad is not None and self._first_bad.item() >= 0:
            terms = [
                f"{name}={float(value):.4g}"
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train") and not torch.isfinite(value).all()
            ]
            self._stop(trainer, int(self._first_bad.item()), "the loss" + (f" ({', '.join(terms)})" if terms else ""))

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
