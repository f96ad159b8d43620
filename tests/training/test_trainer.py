"""Devices, learning rate, checkpoints, callbacks and loggers a config asks for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import tiny_training
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

import main as front_door
from ldm.config.loading import Config
from ldm.config.trainer_args import TrainerSettings
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.defaults import build_callbacks
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.last_checkpoint import LastCheckpoint
from ldm.training.checkpoints import build_checkpoints
from ldm.training.cli import Options, parse_arguments
from ldm.training.plan import Plan, make_plan, scale_learning_rate
from ldm.training.trainer import build_trainer, choose_devices
from ldm.util import ConfigError

CONFIG = """
model: {base_learning_rate: 0.01, target: ldm.models.diffusion.ddpm.DDPM, params: {unet_config: {}}}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 8, num_workers: 0, train: {target: tiny_training.TinyDataset}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_gpus_on_a_machine_without_one(no_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        devices = choose_devices({"accelerator": "gpu", "devices": [0]})
    assert (devices.accelerator, devices.devices, devices.count) == ("cpu", 1, 1)
    assert len(caplog.records) == 1
    assert "training on the CPU" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "accelerator", "count"),
    [({}, "cpu", 1), ({"accelerator": "cpu", "devices": 2}, "cpu", 2), ({"devices": 2, "num_nodes": 3}, "cpu", 6)],
)
def test_devices(no_gpu: None, arguments: dict[str, Any], accelerator: str, count: int) -> None:
    devices = choose_devices(arguments)
    assert (devices.accelerator, devices.count) == (accelerator, count)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("", 0.08),
        ("--scale_lr false", 0.01),
        ("lightning.scale_lr=false", 0.01),
        ("lightning.scale_lr=false --scale_lr", 0.08),
        ("--accumulate_grad_batches 2", 0.16),
        ("lightning.trainer.accumulate_grad_batches=3", 0.24),
    ],
)
def test_the_learning_rate_is_scaled_as_ldm_does(config: Path, words: str, rate: float) -> None:
    plan = make_plan(parse_arguments(["-b", str(config), *words.split()]))
    value, formula = scale_learning_rate(plan, 1)
    assert value == pytest.approx(rate)
    assert formula.startswith(f"{rate:.3g}")
    assert scale_learning_rate(plan, 2)[0] == pytest.approx(rate * (2 if rate > 0.01 else 1))


def test_flags_of_the_disentangling_loss(config: Path) -> None:
    config.write_text(
        CONFIG.replace("ddpm.DDPM", "clip_disdiff.CLIPDisDiff").replace(
            "unet_config: {}", "unet_config: {}, first_stage_config: {}, cond_stage_config: {}, dis_weight: 0.3"
        )
    )
    params = make_plan(parse_arguments(["-b", str(config)])).config.content["model"]["params"]
    assert params["dis_weight"] == 0.3
    params = make_plan(parse_arguments(["-b", str(config), "-dw", "2", "-dt", "Z"])).config.content["model"]["params"]
    assert (params["dis_weight"], params["dis_loss_type"]) == (2.0, "Z")


def test_flags_of_the_disentangling_loss_for_another_model(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"-dw sets model.params.dis_weight.*DDPM"):
        make_plan(parse_arguments(["-b", str(config), "-dw", "2"]))


def test_wrong_device_text(config: Path) -> None:
    with pytest.raises(ConfigError, match="expected device indices"):
        make_plan(parse_arguments(["-b", str(config), "--gpus", "two"]))


def model_monitoring(monitor: str | None) -> pl.LightningModule:
    model = tiny_training.TinyModel()
    model.monitor = monitor
    return model


@pytest.mark.parametrize(
    ("monitor", "mode", "top"),
    [
        ("val/loss", "min", 3),
        ("val/psnr", "max", 3),
        ("train/epoch_num", "max", 3),
        ("val/clip_score", "max", 3),
        (None, "min", 1),
    ],
)
def test_mode_follows_the_metric(folder: RunFolder, monitor: str | None, mode: str, top: int) -> None:
    numbered, last = build_checkpoints(None, model_monitoring(monitor), folder, has_validation=True)
    assert isinstance(numbered, ModelCheckpoint)
    assert isinstance(last, LastCheckpoint)
    assert (numbered.monitor, numbered.mode, numbered.save_top_k) == (monitor, mode, top)
    assert (numbered.filename, numbered.dirpath) == ("{epoch:06}", str(folder.checkpoints))


def test_the_config_wins_over_the_rules(folder: RunFolder) -> None:
    config = {"params": {"mode": "max", "save_top_k": -1, "train_time_interval": {"minutes": 2}, "period": 2}}
    numbered, last = build_checkpoints(config, model_monitoring("val/loss"), folder, has_validation=True)
    assert (numbered.mode, numbered.save_top_k, last.interval_seconds) == ("max", -1, 120.0)
    assert numbered._every_n_epochs == 2


def test_steps_keep_the_last_checkpoint_fresh(folder: RunFolder) -> None:
    config = {"params": {"every_n_train_steps": 50}}
    numbered, last = build_checkpoints(config, model_monitoring("val/loss"), folder, has_validation=True)
    assert last.every_n_train_steps == 50
    assert numbered._every_n_train_steps == 0


def test_step_number_as_monitor(folder: RunFolder) -> None:
    numbered, last = build_checkpoints(None, model_monitoring("train/step_num"), folder, has_validation=True)
    assert (numbered.filename, numbered._every_n_train_steps) == ("{step:09}", 2000)


def test_a_validation_metric_without_validation(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    numbered, _ = build_checkpoints(None, model_monitoring("val/loss"), folder, has_validation=False)
    assert numbered.monitor is None
    assert "no validation data" in caplog.text


def test_callbacks_merge_by_name(folder: RunFolder) -> None:
    config = {
        "image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 5, "max_images": 2}},
        "setup_callback": {"target": "main.SetupCallback", "params": {}},
        "cuda_callback": None,
        "metrics_over_trainsteps_checkpoint": {"params": {"every_n_train_steps": 7}},
    }
    callbacks = build_callbacks(config, folder)
    kinds = [type(callback).__name__ for callback in callbacks]
    assert "CUDACallback" not in kinds and "SetupCallback" not in kinds
    images = next(callback for callback in callbacks if isinstance(callback, ImageLogger))
    assert (images.batch_frequency, images.max_images) == (5, 2)
    steps = next(callback for callback in callbacks if isinstance(callback, ModelCheckpoint))
    assert (steps._every_n_train_steps, steps.save_top_k, steps.filename) == (7, -1, "{epoch:06}-{step:09}")
    assert any(isinstance(callback, LearningRateMonitor) for callback in callbacks)


def test_a_callback_without_a_target(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="lightning.callbacks.mine"):
        build_callbacks({"mine": {"params": {"x": 1}}}, folder)


def plan_of(settings: TrainerSettings) -> Plan:
    return Plan(Options(), Config({"model": {"target": "any"}, "lightning": {"logger": "csv"}}), settings, 0, None)


def test_arguments_lightning_refuses(folder: RunFolder, no_gpu: None) -> None:
    settings = TrainerSettings({"max_epochs": 1, "precision": "17"})
    with pytest.raises(ConfigError, match="lightning.trainer: invalid arguments"):
        build_trainer(plan_of(settings), choose_devices({}), model_monitoring(None), folder)


def test_accumulation_is_handed_to_a_model_that_steps_itself(folder: RunFolder, no_gpu: None) -> None:
    model = model_monitoring(None)
    model.automatic_optimization = False
    model.accumulate_grad_batches = 1
    settings = TrainerSettings({"max_epochs": 1, "accumulate_grad_batches": 4})
    trainer = build_trainer(plan_of(settings), choose_devices({}), model, folder)
    assert (model.accumulate_grad_batches, trainer.accumulate_grad_batches) == (4, 1)
    settings = TrainerSettings({"gradient_clip_val": 1.0})
    with pytest.raises(ConfigError, match="gradient_clip_val"):
        build_trainer(plan_of(settings), choose_devices({}), model, folder)


def test_a_model_that_does_not_take_its_arguments(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.target=pytorch_lightning.demos.boring_classes.BoringModel"]
    assert front_door.main(["-b", str(config), "-t", "-l", str(config.parent / "logs"), *words]) == 1
    message = capsys.readouterr().err
    assert "model.params.unet_config: " in message and "BoringModel does not accept 'unet_config'" in message
    assert not (config.parent / "logs").exists()
