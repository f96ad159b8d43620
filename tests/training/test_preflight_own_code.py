"""Models of own code: their steps are traced, and the options of their pictures are compared with the signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from ldm.runs.folder import RunFolder
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.loggers import build_loggers
from ldm.training.preflight.trace import Batch, trace_steps
from ldm.util import ConfigError, UserError


class Mismatched(pl.LightningModule):
    """A model of own code with a layer that does not fit its input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return a loss."""
        return self.encoder(batch["image"]).mean()


class Flattened(Mismatched):
    """A model of own code that changes the shapes of batches on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch in the shape that the layer needs."""
        return {"image": batch["image"].new_zeros(len(batch["image"]), 7)}


def test_models_that_change_batches_on_the_device_are_not_traced() -> None:
    trace = trace_steps(Flattened(), {"train": Batch({"image": torch.zeros(2, 3)}, 2, 4)})
    assert trace.names == {} and trace.activation_bytes is None


def test_layers_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        UserError, match=r"model.params.ddconfig: .* encoder.1 \(Linear with a weight of shape \(2, 7\)"
    ):
        trace_steps(Mismatched(), {"train": Batch({"image": torch.zeros(2, 3)}, 2, 4)})


def test_tensorboard_has_no_placeholder(tmp_path: Path) -> None:
    (_, board) = build_loggers(None, RunFolder(tmp_path))
    assert isinstance(board, TensorBoardLogger) and not board._default_hp_metric


class Draws:
    """A model of own code that draws pictures."""

    def log_images(self, batch: Any, N: int = 4, split: str = "train") -> dict[str, Any]:
        return {}


def test_options_of_pictures_of_own_code() -> None:
    ImageLogger(10, 4).check_run(None, Draws())
    with pytest.raises(ConfigError, match=r"log_images_kwargs: Draws.log_images: .*'n_rows'\. Correct or remove"):
        ImageLogger(10, 4, log_images_kwargs={"n_rows": 2}).check_run(None, Draws())


def test_a_backward_pass_that_cannot_be_traced_is_no_error() -> None:
    class NeedsValues(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shape mismatch")

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return NeedsValues.apply(self.layer(batch["image"])).sum()

    trace = trace_steps(Model(), {"train": Batch({"image": torch.zeros(2, 3)}, 2, 4)})
    assert trace.operations is None and trace.names == {}
