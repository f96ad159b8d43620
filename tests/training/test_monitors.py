"""Monitored metrics: direction, early errors, scores that a config monitors without a callback."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

import main as front_door
from ldm.config.loading import Config
from ldm.config.trainer_args import TrainerSettings
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.defaults import SCORES, build_callbacks, scores_for
from ldm.training.callbacks.monitor_check import MonitorCheck
from ldm.training.checkpoints import build_checkpoints, direction_of
from ldm.training.cli import Options
from ldm.training.plan import Plan
from ldm.training.trainer import build_trainer, choose_devices

SCORING = {"factor_vae": {"num_train": 60, "num_eval": 40, "num_variance_estimate": 200, "batch_size": 16}}
CONFIG = {
    "model": {"base_learning_rate": 0.1, "target": "test_train_scores.Reader"},
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 60,
            "num_workers": 0,
            "train": {"target": "test_train_scores.Grid"},
            "validation": {"target": "test_train_scores.Grid"},
        },
    },
    "lightning": {
        "logger": "csv",
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
        "callbacks": {"image_logger": None, "representation_writer": None},
    },
}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation"))
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "c.yaml")

    def run(*words: str) -> tuple[int, Path]:
        code = front_door.main(["-b", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path / "logs"), *words])
        return code, max((tmp_path / "logs").glob("*"), default=tmp_path / "logs" / "no run")

    return run


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        ("val/mig", "max"),
        ("val/sap", "max"),
        ("val/dci_disentanglement", "max"),
        ("val/factor_vae_score", "max"),
        ("val/unsupervised", "min"),
        ("val/rec_loss", "min"),
        ("val/loss_simple_ema", "min"),
        ("val/psnr", "max"),
        ("val/clip_accuracy", "max"),
        ("val/clip_score", "max"),
        ("train/epoch_num", "max"),
    ],
)
def test_direction(monitor: str, mode: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO):
        assert direction_of(monitor) == mode
    assert not caplog.records
    best = {"best": {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": {"monitor": monitor}}}
    (built,) = (c for c in build_callbacks(best, RunFolder(tmp_path)) if isinstance(c, ModelCheckpoint))
    assert built.mode == mode
    numbered, _ = build_checkpoints({"params": {"monitor": monitor, "mode": "min"}}, None, RunFolder(tmp_path), True)
    assert numbered.mode == "min"


def test_an_unknown_direction_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert direction_of("val/own") == "min"
    assert "the direction of val/own is unknown" in caplog.text


@pytest.mark.parametrize("words", [(), ("lightning.trainer.num_sanity_val_steps=0",)])
def test_a_misspelt_monitor_of_the_validation(
    train, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = train("lightning.modelcheckpoint.params.monitor=val/los", "model.params.width=1", *words)
    assert code == 1
    message = capsys.readouterr().err
    assert "monitor: expected a logged metric, got 'val/los'. Did you mean 'val/loss'? Logged: val/loss" in message
    assert not list(run.glob("checkpoints/epoch*.ckpt"))


class Known(pl.LightningModule):
    """A model that counts as code of this package."""

    __module__ = "ldm.tests"
    monitor = "val/los"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.steps = torch.nn.Parameter(torch.zeros(1)), 0

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        self.log("train/loss", self.weight.square().sum())
        return self.weight.square().sum()

    def validation_step(self, batch: object, batch_idx: int) -> None:
        self.log("val/loss", self.weight.square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("monitor", "steps"), [("val/los", 0), ("train/los", 1)])
def test_a_misspelt_monitor_is_an_error_before_the_second_step(tmp_path: Path, monitor: str, steps: int) -> None:
    model = Known()
    model.monitor = monitor
    quiet = {"image_logger": None, "representation_writer": None, "learning_rate_logger": None, "cuda_callback": None}
    settings = TrainerSettings({"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"})
    lightning = {"logger": "csv", "callbacks": quiet}
    config = Config({"model": {"target": "Known"}, "data": {"params": {"validation": "any"}}, "lightning": lightning})
    plan = Plan(Options(), config, settings, 0, None)
    trainer = build_trainer(plan, choose_devices({"accelerator": "cpu"}), model, RunFolder(tmp_path))
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=f"got '{monitor}'. Did you mean '{monitor}s'"):
        trainer.fit(model, loader, loader)
    assert model.steps == steps


def test_scores_are_added_when_they_are_needed(tmp_path: Path) -> None:
    assert scores_for({"val/loss", "train/epoch_num"}, None) is None
    assert scores_for((), "shapes3d")["params"]["metrics"] == ["factor_vae", "dci", "mig"]
    scores = scores_for({"val/sap"}, None)
    assert scores == {"target": SCORES, "params": {"metrics": ["factor_vae", "dci", "mig", "sap"]}}
    own = {"mine": {"target": SCORES, "params": {"every_n_train_steps": 5}}}
    for config, count in (({}, 1), ({"scores": None}, 0), (own, 1)):
        built = build_callbacks(config, RunFolder(tmp_path), scores)
        assert sum(type(callback).__name__ == "ScoreWhileTraining" for callback in built) == count


def test_a_config_that_monitors_scores_needs_no_callback_for_them(train) -> None:
    """As EncDiff's configs: two checkpoints by scores, and nothing that takes them."""
    best = (
        "{target: pytorch_lightning.callbacks.ModelCheckpoint, params: {monitor: val/%s, filename: %s, save_top_k: 1}}"
    )
    words = [
        "lightning.callbacks.best_vae=" + best % ("factor_vae_score", "best_vae"),
        "lightning.callbacks.best_dci=" + best % ("dci_disentanglement", "best_dci"),
    ]
    code, run = train(*words)
    assert code == 0
    saved = {path.name for path in run.glob("checkpoints/*.ckpt")}
    assert {"best_vae.ckpt", "best_dci.ckpt", "last.ckpt"} <= saved
    header = (run / "testtube" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"val/factor_vae_score", "val/dci_disentanglement"} <= set(header.split(","))
    steps = [line.split(",")[0] for line in (run / "scores.csv").read_text().splitlines()]
    assert steps == ["step", "2", "4"]


def test_scores_without_validation_data_are_taken_at_the_end_of_epochs(train) -> None:
    best = "{target: pytorch_lightning.callbacks.ModelCheckpoint, params: {monitor: val/mig, filename: best}}"
    code, run = train(f"lightning.callbacks.best={best}", "data.params.validation=null")
    assert code == 0
    assert (run / "checkpoints" / "best.ckpt").is_file()


def test_a_run_that_is_resumed_after_its_first_step(tmp_path: Path) -> None:
    """The metrics of the first step are those of the resumed part."""

    options = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": tmp_path}
    data = torch.utils.data.DataLoader([torch.zeros(1)] * 8)
    best = ModelCheckpoint(tmp_path, monitor="train/loss", save_last=True, every_n_train_steps=1)
    for steps, checkpoint in ((1, None), (3, tmp_path / "last.ckpt")):
        trainer = pl.Trainer(max_steps=steps, callbacks=[MonitorCheck(), best], **options)
        trainer.fit(Known(), data, ckpt_path=checkpoint)
    assert trainer.global_step == 3
