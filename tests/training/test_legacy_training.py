"""What the training room does for configs of the references: records, checkpoints of callbacks, loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger

from ldm.config.signatures import is_installed
from ldm.runs.folder import RunFolder
from ldm.training.callbacks.defaults import build_callbacks
from ldm.training.callbacks.image_logger import ImageLogger
from ldm.training.callbacks.record import Record
from ldm.training.loggers import build_loggers
from ldm.util import UserError


def test_legacy_record_keeps_the_training_losses(tmp_path: Path) -> None:
    record = Record(plot_image=True, every_step_num=2)
    for step in range(1, 5):
        record.write(tmp_path, step, {"train/loss": torch.tensor(step / 2), "val/loss": torch.tensor(9.0)})
    assert (tmp_path / "record.csv").read_text().splitlines() == ["step,train/loss", "2,1.0", "4,2.0"]
    Record(every_step_num=1).write(tmp_path, 5, {"train/other": torch.tensor(1.0), "train/loss": torch.tensor(3.0)})
    assert (tmp_path / "record.csv").read_text().splitlines()[-1] == "5,3.0"


def test_legacy_image_logger_takes_a_record() -> None:
    config = {"target": "ldm.tools.Record", "params": {"plot_image": True}}
    logger = ImageLogger(batch_frequency=4, max_images=2, log_config=config)
    assert isinstance(logger.record, Record) and logger.record.every_step_num == 200
    assert ImageLogger(batch_frequency=4, max_images=2).record is None


def test_legacy_checkpoint_callbacks_write_into_the_run(tmp_path: Path) -> None:
    best = {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": {"monitor": "val/x", "period": 2}}
    elsewhere = {**best, "params": {"dirpath": str(tmp_path / "other")}}
    built = build_callbacks({"best": best, "elsewhere": elsewhere}, RunFolder(tmp_path))
    first, second = (callback for callback in built if isinstance(callback, ModelCheckpoint))
    assert (Path(first.dirpath), first._every_n_epochs) == (tmp_path / "checkpoints", 2)
    assert Path(second.dirpath) == tmp_path / "other"


class NeedsMore(DummyLogger):
    """A logger whose own package is missing."""

    def __init__(self, save_dir: str, **_: Any) -> None:
        raise ModuleNotFoundError("No module named 'wandb'")


def test_legacy_logger_without_its_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"NeedsMore cannot be created \(No module named 'wandb'\).*logger=null"):
        build_loggers({"target": "test_legacy_training.NeedsMore", "params": {"name": "x"}}, RunFolder(tmp_path))


def test_legacy_packages_are_looked_for_without_importing_them() -> None:
    assert is_installed("ldm.anything.At") and is_installed("torch.nn.Identity")
    assert not is_installed("sgm.models.diffusion.DiffusionEngine")
