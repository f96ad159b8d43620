"""Seeds, pictures, guards and metrics while training."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.callbacks.model_checkpoint import warning_cache
from tiny_training import TinyDataset, TinyModel
from torch.utils.data import DataLoader

import main as front_door
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.cuda import CUDACallback
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.callbacks.step_seed import StepSeed
from ldm.training.loggers import MetricsCSVLogger, build_loggers
from ldm.util import UserError

CONFIG = """
model: {base_learning_rate: 0.05, target: tiny_training.TinyModel}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 4
    num_workers: 0
    train: {target: tiny_training.TinyDataset}
    validation: {target: tiny_training.TinyDataset, params: {size: 8}}
    test: {target: tiny_training.TinyDataset, params: {size: 8}}
lightning:
  trainer: {max_epochs: 2, log_every_n_steps: 2, accelerator: cpu}
  callbacks: {image_logger: {params: {batch_frequency: 4}}, representation_writer: null}
"""


@pytest.fixture
def train(tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def run(*words: str) -> tuple[int, Path]:
        code = front_door.main(["-b", str(tmp_path / "tiny.yaml"), "-t", "-l", str(tmp_path / "logs"), *words])
        return code, max((tmp_path / "logs").glob("*"), default=tmp_path / "logs" / "no run")

    return run


def test_a_run_has_the_layout_of_the_family(train) -> None:
    code, run = train("-n", "name", "-f", "_x")
    assert code == 0
    assert run.name.endswith("_name_x")
    found = {str(path.relative_to(run)) for path in run.rglob("*")}
    stamp = run.name.split("_")[0]
    assert {
        "run.json",
        "log.txt",
        f"configs/{stamp}-project.yaml",
        f"configs/{stamp}-lightning.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/epoch=000000.ckpt",
        "checkpoints/epoch=000001.ckpt",
        "testtube/version_0/metrics.csv",
        "images/train/squares_gs-000001_e-000000_b-000000.png",
        "images/train/squares_gs-000008_e-000001_b-000001.png",
        "images/val/squares_gs-000012_e-000001_b-000000.png",
    } <= found
    picture = Image.open(run / "images/train/squares_gs-000001_e-000000_b-000000.png")
    assert picture.mode == "RGB"


def test_nan_stops_with_advice_and_spares_the_checkpoint(train, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train("model.params.broken_step=8")
    assert code == 1
    message = capsys.readouterr().err
    assert "NaN or infinity at step 8 (epoch 1)" in message
    assert "train/loss=nan" in message
    assert f"python main.py -r {run} -t" in message
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())


def test_nan_before_the_first_checkpoint(train, capsys: pytest.CaptureFixture[str]) -> None:
    code, run = train("model.params.broken_step=1")
    assert code == 1
    assert "There is no checkpoint yet" in capsys.readouterr().err
    assert not (run / "checkpoints" / "last.ckpt").exists()


def test_test_only(train, caplog: pytest.LogCaptureFixture) -> None:
    _, run = train("--no-test")
    configs = list((run / "configs").iterdir())
    with caplog.at_level("INFO"):
        assert front_door.main(["-r", str(run)]) == 0
    assert "test/loss" in caplog.text
    assert list((run / "configs").iterdir()) == configs


@pytest.mark.parametrize("score", ["editing.callback.EditScore", "prompts.callback.PromptScore"])
def test_scores_are_checked_before_training_if_there_is_a_test_pass(train, capsys, score: str) -> None:
    words = [
        f"lightning.callbacks.score.target=ldm.evaluation.{score}",
        "lightning.callbacks.score.params.judge=nowhere",
    ]
    code, run = train(*words)
    assert code == 1 and not run.exists()
    assert "expected a" in capsys.readouterr().err
    code, run = train(*words, "--no-test")
    assert code == 0 and (run / "checkpoints" / "last.ckpt").is_file()


def test_image_schedule() -> None:
    logger = ImageLogger(batch_frequency=8, max_images=1)
    assert [step for step in range(30) if logger.is_due(step)] == [1, 2, 4, 8, 16, 24]
    assert not logger.is_due(1)
    assert logger.is_due(1, "val")
    assert not ImageLogger(batch_frequency=8, max_images=1).is_due(0)
    assert ImageLogger(batch_frequency=8, max_images=1, log_first_step=True).is_due(0)
    plain = ImageLogger(batch_frequency=8, max_images=1, increase_log_steps=False)
    assert [step for step in range(20) if plain.is_due(step)] == [8, 16]


def test_mode_and_random_state_are_restored_if_pictures_fail() -> None:
    class Broken(TinyModel):
        def log_images(self, batch: Any, **options: Any) -> dict[str, Any]:
            assert not self.training and torch.rand(()) < 1
            raise KeyError("image")

    model, state = Broken().train(), torch.get_rng_state()
    with pytest.raises(KeyError):
        ImageLogger(batch_frequency=8, max_images=1)._draw(model, {}, "train")
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_noise_depends_on_seed_step_stage_and_rank() -> None:
    class FakeTrainer:
        global_rank = 0
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def draw(seed: int, stage: int, counter: int, rank: int = 0) -> tuple[float, float]:
        FakeTrainer.global_rank = rank
        StepSeed(seed)._reseed(stage, FakeTrainer(), counter)
        return float(torch.rand(())), float(np.random.rand())

    assert draw(1, 0, 5) == draw(1, 0, 5)
    others = {draw(1, 0, 6), draw(2, 0, 5), draw(1, 1, 5), draw(1, 0, 5, rank=1)}
    assert len(others | {draw(1, 0, 5)}) == 5


def rows(logger: MetricsCSVLogger) -> list[dict[str, str]]:
    with logger.path.open(newline="") as stream:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]


def test_metrics_survive_resuming(tmp_path: Path) -> None:
    first = MetricsCSVLogger(str(tmp_path), flush_logs_every_n_steps=1)
    for step in range(4):
        first.log_metrics({"train/loss": step / 2}, step)
    first.log_metrics({"val/loss": 9.0}, 3)
    first.save()
    with first.path.open("a") as stream:
        stream.write("0.5")  # a line cut short
    second = MetricsCSVLogger(str(tmp_path), flush_logs_every_n_steps=1)
    second.continue_from(3)
    assert [row["step"] for row in rows(second)] == ["0", "1", "2"]
    second.log_metrics({"train/loss": 1.0}, 2)  # the earlier part has this one
    second.log_metrics({"train/loss": 1.5}, 3)
    second.log_metrics({"new": 1.0}, 3)
    second.finalize("success")
    assert [(row["step"], row.get("train/loss"), row.get("new")) for row in rows(second)] == [
        ("0", "0.0", None),
        ("1", "0.5", None),
        ("2", "1.0", None),
        ("3", "1.5", None),
        ("3", None, "1.0"),
    ]


def test_wandb_is_asked_for_by_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match="pip install wandb"):
        build_loggers("wandb", RunFolder(tmp_path))


def test_old_logger_names(tmp_path: Path) -> None:
    choice = {"target": "pytorch_lightning.loggers.TestTubeLogger", "params": {"name": "testtube"}}
    (logger,) = build_loggers(choice, RunFolder(tmp_path))
    assert isinstance(logger, MetricsCSVLogger)
    assert logger.log_dir == str(tmp_path / "testtube" / "version_0")


def test_duration_and_memory_are_the_maximum_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 2**20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: value)

    class Strategy:
        root_device = torch.device("cuda")

        def reduce(self, value: float, reduce_op: str) -> float:
            operations.append(reduce_op)
            return value

    trainer = SimpleNamespace(strategy=Strategy(), is_global_zero=True, current_epoch=0)
    callback = CUDACallback()
    callback.on_train_epoch_start(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    assert operations == ["max", "max"]


def test_progress_counts_the_batches_of_a_run_limited_by_steps(tmp_path: Path, caplog) -> None:
    bar = SpeedBar(line_seconds=0.0)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_epochs=-1, max_steps=3, limit_val_batches=0, callbacks=[bar], **options)
    with caplog.at_level("INFO", "ldm"):
        trainer.fit(TinyModel(), DataLoader(TinyDataset(), batch_size=4))
    shown = [record.args[1:3] for record in caplog.records if "  step " in record.getMessage()]
    assert shown == [(1, 3), (2, 3), (3, 3)]


def test_progress_of_an_epoch_that_is_resumed(tmp_path: Path, caplog) -> None:
    options = {"logger": False, "accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0}
    loader = DataLoader(TinyDataset(), batch_size=4)
    writer = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    pl.Trainer(max_epochs=1, callbacks=[writer], **options).fit(TinyModel(), loader)
    trainer = pl.Trainer(max_epochs=1, callbacks=[SpeedBar(line_seconds=0.0)], enable_checkpointing=False, **options)
    with caplog.at_level("INFO", "ldm"):
        trainer.fit(TinyModel(), loader, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    shown = [record.args[1:3] for record in caplog.records if "  step " in record.getMessage()]
    assert shown == [(batch, len(loader)) for batch in range(3, len(loader) + 1)]


def test_progress_shows_a_speed_once_it_is_measured(tmp_path: Path, caplog) -> None:
    """Neither one quick step is a measurement, nor is the time of the sanity validation subtracted from a step."""
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    loader = DataLoader(TinyDataset(), batch_size=4)
    for rate in (1, 2):
        bar = SpeedBar(refresh_rate=rate, line_seconds=0.0)
        bar._batch_ended_at -= 1000.0  # a long start
        trainer = pl.Trainer(max_steps=4, callbacks=[bar], **options)
        with caplog.at_level("INFO", "ldm"):
            trainer.fit(TinyModel(), loader, loader)
    lines = [text for text in caplog.messages if "  step " in text]
    assert len(lines) == 6
    assert not any("images/s" in text or "waiting" in text for text in lines[:4])
    assert all(int(text.split(" images/s")[0].split()[-1]) < 1_000_000 for text in lines[4:])


def test_the_best_checkpoints_of_a_moved_run_are_kept(train, recwarn) -> None:
    keep = "lightning.modelcheckpoint.params.save_top_k=2"
    code, run = train(keep)
    moved = run.parent / "elsewhere" / run.name
    moved.parent.mkdir()
    run.rename(moved)
    assert front_door.main(["-r", str(moved), "-t", "lightning.trainer.max_epochs=4"]) == 0
    kept = sorted(path.name for path in (moved / "checkpoints").glob("epoch=*.ckpt"))
    assert len(kept) == 2 and not run.exists()
    next((moved / "checkpoints").glob("epoch=*.ckpt")).unlink()
    moved.rename(run)
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=5"]) == 0
    assert not [warning for warning in recwarn if "dirpath has changed" in str(warning.message)]


def test_a_run_that_ends_before_its_first_validation_has_no_warning_of_lightning(train, recwarn) -> None:
    warning_cache.clear()
    assert train("--max_steps", "2")[0] == 0
    assert not [warning for warning in recwarn if "could not find the monitored key" in str(warning.message)]
