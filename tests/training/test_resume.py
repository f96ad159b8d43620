"""A run that was stopped, killed or broken off goes on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main as front_door

CONFIG = """
model:
  base_learning_rate: 0.05
  target: tiny_training.TinyModel
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 4
    num_workers: 0
    train: {target: tiny_training.TinyDataset}
    validation: {target: tiny_training.TinyDataset, params: {size: 8}}
lightning:
  scale_lr: false
  logger: csv
  trainer: {max_epochs: 3, log_every_n_steps: 1, accelerator: cpu}
  callbacks: {image_logger: null}
"""


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def train(config: Path, logdir: Path, *words: str) -> tuple[int, Path]:
    code = front_door.main(["--base", str(config), "-t", "-l", str(logdir), *words])
    return code, max(logdir.iterdir())


def curve(run: Path) -> list[tuple[int, float]]:
    with (run / "testtube" / "version_0" / "metrics.csv").open() as stream:
        return [(int(r["step"]), float(r["train/loss"])) for r in csv.DictReader(stream) if r["train/loss"]]


def validation(run: Path) -> list[tuple[int, float]]:
    with (run / "testtube" / "version_0" / "metrics.csv").open() as stream:
        return [(int(r["step"]), float(r["val/loss"])) for r in csv.DictReader(stream) if r["val/loss"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def assert_same(run: Path, reference: Path) -> None:
    assert curve(run) == curve(reference)
    assert validation(run) == validation(reference)
    for key, value in weights(reference).items():
        torch.testing.assert_close(weights(run)[key], value, rtol=0, atol=0)


@pytest.fixture
def reference(tiny_yaml: Path, tmp_path: Path) -> Path:
    code, run = train(tiny_yaml, tmp_path / "reference")
    assert code == 0
    assert record(run)["status"] == "finished"
    assert len(curve(run)) == 18
    return run


@pytest.mark.parametrize("step", [2, 5, 7, 11])
def test_ctrl_c_saves_a_whole_step_and_resuming_continues_exactly(
    step: int, tiny_yaml: Path, tmp_path: Path, reference: Path
) -> None:
    code, run = train(tiny_yaml, tmp_path / "stopped", f"model.params.signal_step={step}")
    assert code == 130
    assert record(run)["status"] == "interrupted"
    assert front_door.main(["-r", str(run), "-t", "model.params.signal_step=-1"]) == 0
    assert record(run)["status"] == "finished"
    assert_same(run, reference)


def test_resuming_in_bfloat16_continues_exactly(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["--precision", "bf16-mixed"]
    code, whole = train(tiny_yaml, tmp_path / "whole", *words)
    assert code == 0
    code, run = train(tiny_yaml, tmp_path / "stopped", *words, "model.params.signal_step=7")
    assert code == 130
    assert front_door.main(["-r", str(run), "-t", "model.params.signal_step=-1"]) == 0
    assert_same(run, whole)


def test_an_error_in_a_step_leaves_a_checkpoint_of_the_step_before(
    tiny_yaml: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_training

    def explode(self: object, batch: object, batch_idx: int) -> None:
        raise ArithmeticError("boom")

    original = tiny_training.TinyModel.training_step
    monkeypatch.setattr(
        tiny_training.TinyModel,
        "training_step",
        lambda self, batch, i: (explode if self.global_step == 8 else original)(self, batch, i),
    )
    with pytest.raises(ArithmeticError):
        train(tiny_yaml, tmp_path / "broken")
    run = max((tmp_path / "broken").iterdir())
    assert record(run)["status"] == "failed"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    monkeypatch.setattr(tiny_training.TinyModel, "training_step", original)
    assert front_door.main(["-r", str(run), "-t"]) == 0
    assert_same(run, reference)


def test_a_fresh_last_checkpoint_every_few_steps(tiny_yaml: Path, tmp_path: Path, reference: Path) -> None:
    words = ["lightning.modelcheckpoint.params.every_n_train_steps=2", "model.params.broken_step=9"]
    code, run = train(tiny_yaml, tmp_path / "nan", *words)
    assert code == 1
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert front_door.main(["-r", str(run), "-t", "model.params.broken_step=-1"]) == 0
    assert_same(run, reference)


@pytest.mark.slow
def test_kill_9_in_mid_epoch(tiny_yaml: Path, tmp_path: Path, reference: Path) -> None:
    words = ["model.params.signal_step=9", "model.params.signal_number=9"]
    words += ["lightning.modelcheckpoint.params.every_n_train_steps=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, front_door.__file__, "-b", str(tiny_yaml), "-t", "-l", str(tmp_path / "killed")]
    assert subprocess.run([*command, *words], env=environment).returncode == -9
    run = max((tmp_path / "killed").iterdir())
    assert record(run)["status"] == "running"
    assert front_door.main(["-r", str(run), "-t", "model.params.signal_step=-1"]) == 0
    assert_same(run, reference)


def test_the_record_is_in_the_checkpoint(reference: Path) -> None:
    checkpoint = torch.load(reference / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["run"]["seed"] == 23
    assert checkpoint["run"]["config"]["model"]["target"] == "tiny_training.TinyModel"
    assert set(checkpoint["run"]["versions"]) == {"python", "torch", "lightning", "numpy", "open_clip"}
