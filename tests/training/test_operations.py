"""Operations of a training step, counted before the first step for the share of the peak that training shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.preflight import preflight
from ldm.training.preflight.trace import Batch, trace_steps


def test_operations_of_a_training_step_are_counted() -> None:
    """A convolution whose numbers are known, in both passes; the gradient of the images is not computed."""

    class OneConvolution(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 5, 3, padding=1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch["image"]).square().mean()

    once = 2 * (4 * 5 * 8 * 8) * (3 * 9)
    assert (
        trace_steps(OneConvolution(), {"train": Batch({"image": torch.zeros(2, 3, 8, 8)}, 2, 4)}).operations == 2 * once
    )


@pytest.mark.parametrize(("names", "operations"), [(("vq",), 7.5858e9), (("latents", "ldm"), 9.506521088e9)])
def test_operations_of_stages(names: tuple[str, ...], operations: float, tmp_path: Path) -> None:
    """Those of a step on real tensors; with automatic and with manual optimization."""
    base = tuple(f"configs/quickstart/{name}.yaml" for name in ("world", *names))
    stage = () if names == ("vq",) else ("model.params.first_stage_config.params.ckpt_path=null",)
    plan = make_plan(Options(base=base, overrides=stage, name="x", logdir=str(tmp_path), train=True))
    model, data = plan.config.build("model"), plan.config.build("data")
    bar = SpeedBar()
    preflight(plan, pl.Trainer(logger=False, accelerator="cpu", callbacks=[bar], barebones=False), model, data)
    assert bar.operations_per_image * data.batch_size == pytest.approx(operations, rel=1e-4)
