"""Precisions of a training, and gradients that are clipped under a scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import main as front_door
from ldm.models.autoencoder import VQModel
from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.trainer import Devices, choose_precision

QUICKSTART = [str(Path(__file__).parents[2] / f"configs/quickstart/{name}.yaml") for name in ("world", "vq")]
DDCONFIG = {"double_z": False, "z_channels": 3, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32}
DDCONFIG |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
LOSS = {"disc_start": 0, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1, "codebook_weight": 1.0}
ADVERSARIAL = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": LOSS}


@pytest.mark.parametrize("precision", ["64", "64-true", "bf16-true", "16-true", "transformer-engine"])
def test_other_types_of_all_weights_are_refused_by_name(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert front_door.main(["-b", *QUICKSTART, "--precision", precision]) == 1
    message = capsys.readouterr().err
    assert "lightning.trainer.precision: expected auto, 32-true, bf16-mixed or 16-mixed" in message
    assert f"got {precision.removesuffix('-true')}" in message and "Traceback" not in message


@pytest.mark.parametrize("precision", ["auto", "16", "32", "bf16", "32-true", "bf16-mixed", "16-mixed"])
def test_mixed_precision_is_accepted(precision: str) -> None:
    assert front_door.main(["-b", *QUICKSTART, "--precision", precision]) == 0


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [("cpu", True, "bf16-mixed"), ("cpu", False, "32-true"), ("gpu", True, "32-true"), ("mps", True, "32-true")],
)
def test_auto_follows_the_hardware(device, has_bfloat16, expected, monkeypatch) -> None:
    capabilities = {"amx_bf16": False, "avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "gpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose_precision({"precision": "auto"}, Devices(device, 1, 1)) == expected
    assert choose_precision({"precision": "16-mixed"}, Devices(device, 1, 1)) == "16-mixed"
    assert choose_precision({}, Devices(device, 1, 1)) == "32-true"


def test_auto_takes_bfloat16_of_newer_gpus_and_float32_of_older_versions(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_precision({"precision": "auto"}, Devices("gpu", "0,", 1)) == "bf16-mixed"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision({"precision": "auto"}, Devices("cpu", 1, 1)) == "32-true"


def test_auto_is_the_default_of_new_runs_of_own_models() -> None:
    assert make_plan(Options(base=QUICKSTART)).settings.arguments["precision"] == "auto"
    chosen = make_plan(Options(base=QUICKSTART, trainer={"precision": "32"}))
    assert chosen.settings.arguments["precision"] == "32-true"


class Norms(pl.Callback):
    """Records the norms of the gradients at every step of an optimizer, and the scale."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []

    def record(self, optimizer: Any, index: int) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.steps.append((index, float(torch.nn.utils.get_total_norm(grads))))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_pre_hook(lambda each, args, kwargs, i=index: self.record(each, i))


def fit(tmp_path: Path, clip: float | None, scale: float, accumulate: int = 1) -> tuple[Norms, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    model = VQModel(ddconfig=DDCONFIG, lossconfig=ADVERSARIAL, n_embed=8, embed_dim=3)
    model.learning_rate, model.gradient_clip_val, model.accumulate_grad_batches = 1e-3, clip, accumulate
    data = [{"image": torch.rand(8, 8, 3) * 2 - 1} for _ in range(12)]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    norms = Norms()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, plugins=[plugin], callbacks=[norms], default_root_dir=tmp_path, **options)
    trainer.fit(model, DataLoader(data, batch_size=2))
    return norms, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_are_unscaled_before_they_are_clipped(tmp_path: Path, accumulate: int) -> None:
    free, trainer = fit(tmp_path, None, 256.0, accumulate)
    assert trainer.global_step == 6 // accumulate and len(free.steps) == 12 // accumulate
    assert all(0.05 < norm < 50 for _, norm in free.steps)
    clipped, _ = fit(tmp_path, 0.04, 256.0, accumulate)
    assert [index for index, _ in clipped.steps] == [0, 1] * (6 // accumulate)
    assert all(norm == pytest.approx(0.04, rel=1e-3) for _, norm in clipped.steps)


def test_infinite_gradients_skip_the_step_and_lower_the_scale(tmp_path: Path) -> None:
    norms, trainer = fit(tmp_path, 1.0, 2.0**40)
    assert trainer.global_step == 6
    assert len(norms.steps) < 12 and all(norm <= 1.001 for _, norm in norms.steps)
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**40
