"""Stop at the first NaN or infinity, before it reaches a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from ldm.util import UserError


class NonFiniteGuard(pl.Callback):
    """Watches the loss on the device and looks at the outcome only now and then, so that it costs no waiting.

    Args:
        checkpoints: folder of the run's checkpoints, named in the message.
    """

    def __init__(self, checkpoints: str) -> None:
        self.checkpoints = Path(checkpoints)
        self._first_bad: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step if the loss is not finite; look every ``log_every_n_steps`` batches."""
        for value in _scalars(outputs):
            self._note(value.detach(), trainer.fit_loop.total_batch_idx)
        if (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before anyone draws conclusions from the epoch."""
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save broken weights: the older checkpoint stays."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._look(trainer)
        trained = [parameter.detach() for parameter in pl_module.parameters() if parameter.requires_grad]
        if trained and not torch.isfinite(torch.nn.utils.get_total_norm(trained)):
            names = [name for name, value in pl_module.named_parameters() if not torch.isfinite(value).all()]
            if names:
                self._stop(trainer, trainer.fit_loop.total_batch_idx, f"weights {', '.join(names[:5])}")

    def _note(self, value: Tensor, step: int) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.long, device=value.device)
        is_new = ~torch.isfinite(value).all() & (self._first_bad < 0)
        self._first_bad = torch.where(is_new, step, self._first_bad)

    def _look(self, trainer: pl.Trainer) -> None:
        if self._first_bad is not None and self._first_bad.item() >= 0:
            terms = [
                f"{name}={float(value):.4g}"
                for name, value in trainer.callback_metrics.items()
                if name.startswith("train") and not torch.isfinite(value).all()
            ]
            self._stop(trainer, int(self._first_bad.item()), "the loss" + (f" ({', '.join(terms)})" if terms else ""))

    def _stop(self, trainer: pl.Trainer, step: int, what: str) -> None:
        saved = sorted(self.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        run_dir = self.checkpoints.parent
        if saved:
            advice = f"The newest good checkpoint is {saved[-1]}. Go on from it: python main.py -r {run_dir} -t"
        else:
            advice = "There is no checkpoint yet. Start again"
        raise UserError(
            f"NaN or infinity at step {step} (epoch {trainer.current_epoch}): {what}. {advice} with a smaller "
            "learning rate (model.base_learning_rate=...) or with lightning.trainer.gradient_clip_val=1.0"
        )


def _scalars(outputs: Any) -> itertools.chain[Tensor]:
    """Return the floating tensors a training step handed back: its loss, or a mapping of terms."""
    values = outputs.values() if isinstance(outputs, Mapping) else (outputs,)
    return itertools.chain(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
