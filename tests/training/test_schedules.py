"""Schedules that have no effect because the run is too short."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_training

import main as front_door
from ldm.config.loading import load_config
from ldm.training.schedules import late_schedules

ROOT = Path(__file__).parents[2]


class Late(tiny_training.TinyModel):
    """A model with an option that starts at a step."""

    def __init__(self, disc_start: int = 0, **options: int) -> None:
        super().__init__(**options)


KL = {"params": {"lossconfig": {"params": {"disc_start": 50001, "disc_weight": 0.5}}}}
WARM_UP = {"params": {"warm_up_steps": [1000], "f_start": [1.0e-6], "lr_start": 1.0, "linear_start": 0.0015}}
EPOCH = {"shapes3d": 3750, "mpi3d": 8100, "cars3d": 1373, "celeba": 1583}  # batches of 128 images


def test_late_schedules_are_named() -> None:
    (message,) = late_schedules(KL, 18750)
    assert message.startswith(
        "model.params.lossconfig.params.disc_start: starts at step 50001, but the run ends at step"
    )
    (message,) = late_schedules({"params": {"scheduler_config": WARM_UP}}, 500)
    assert message.startswith("model.params.scheduler_config.params.warm_up_steps: warm-up ends at step 1000")
    assert late_schedules({"params": {"list": [{"kl_start": 7}]}}, 7)


def test_schedules_in_time_are_not_named() -> None:
    assert not late_schedules(KL, 50002) and not late_schedules(KL, float("inf"))
    assert not late_schedules({"params": {"scheduler_config": WARM_UP}}, 1001)
    off = {"params": {"lossconfig": {"params": {"disc_start": 50001, "disc_weight": 0.0}}}}
    assert not late_schedules(off, 2)


def test_a_run_warns_at_its_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {target: test_schedules.Late, base_learning_rate: 0.01}\n"
        "data:\n  target: main.DataModuleFromConfig\n"
        "  params: {batch_size: 4, num_workers: 0, train: {target: tiny_training.TinyDataset}}\n"
        "lightning: {logger: csv, callbacks: {image_logger: null}, trainer: {max_epochs: 2, accelerator: cpu}}\n"
    )
    words = ["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path / "logs")]
    assert front_door.main([*words, "model.params.disc_start=12"]) == 0
    assert "disc_start: starts at step 12, but the run ends at step 12" in caplog.text
    caplog.clear()
    assert front_door.main([*words, "model.params.disc_start=11"]) == 0
    assert "disc_start" not in caplog.text


@pytest.mark.parametrize("data", EPOCH)
@pytest.mark.parametrize("stage", ["vq", "kl"])
@pytest.mark.parametrize(
    "kind", ["autoencoder/{}_{}_4_16", "latent-diffusion/{}-{}-4-16", "latent-diffusion/{}-{}-4-16-dis"]
)
def test_all_schedules_of_shipped_configs_take_effect(data: str, stage: str, kind: str) -> None:
    path = ROOT / "configs" / f"{kind.format(data, stage)}.yaml"
    content = load_config([path], roots=["nowhere"], allow_pending=True).content
    trainer = content["lightning"]["trainer"]
    steps = trainer["max_epochs"] * -(-EPOCH[data] // trainer.get("accumulate_grad_batches", 1))
    assert not late_schedules(content["model"], min(steps, trainer.get("max_steps", steps)))
