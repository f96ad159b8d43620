"""A model of a few weights and data of a few numbers, so that training itself can be tested in a second."""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class TinyDataset(Dataset):
    """``size`` rows of three numbers, item i always the same."""

    def __init__(self, size: int = 24) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.sin(torch.arange(3.0) + index), "index": index}


class TinyModel(pl.LightningModule):
    """Linear regression on noisy inputs with a moving average of the weight, as the real models have."""

    monitor = "val/loss"

    def __init__(
        self,
        width: int = 3,
        broken_step: int = -1,
        signal_step: int = -1,
        signal_number: int = 2,
        ckpt_path: str | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)
        self.register_buffer("average", torch.zeros(1, width))
        self.broken_step = broken_step
        self.signal_step = signal_step
        self.signal_number = signal_number
        self.learning_rate = 0.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss with fresh noise, so that a wrong random state or batch shows."""
        x = batch["image"] + torch.randn_like(batch["image"])
        loss = self.layer(x).square().mean() + self.average.square().mean()
        if self.global_step == self.broken_step:
            loss = loss * float("nan")
        if self.global_step == self.signal_step:
            os.kill(os.getpid(), self.signal_number)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average along; a checkpoint written before this hook would lack one step of it."""
        self.average.mul_(0.9).add_(self.layer.weight.detach(), alpha=0.1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """A noisy figure too."""
        self.log("val/loss", self.layer(batch["image"] + torch.randn_like(batch["image"])).square().mean())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """A figure."""
        self.log("test/loss", self.layer(batch["image"]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam has state, which has to survive resuming."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def log_images(self, batch: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        """Four grey squares."""
        return {"squares": torch.zeros(4, 3, 8, 8)}
