"""A run that fails before its first step changes nothing: neither a finished run nor the folder of the runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from tiny_training import TinyDataset, TinyModel

import main as front_door

CONFIG = """
model: {base_learning_rate: 0.05, target: tiny_training.TinyModel}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 4
    train: {target: tiny_training.TinyDataset}
    validation: {target: tiny_training.TinyDataset}
    test: {target: tiny_training.TinyDataset}
lightning:
  trainer: {max_epochs: 1, accelerator: cpu}
  logger: csv
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(config: Path, tmp_path: Path) -> Path:
    assert front_door.main(["-b", str(config), "-t", "-l", str(tmp_path / "logs")]) == 0
    return next((tmp_path / "logs").iterdir())


FAILING = {
    "an override that does not fit the checkpoint": ["model.params.width=5"],
    "an unknown accelerator": ["--accelerator", "nothing"],
    "a device that does not exist": ["--accelerator", "cpu", "--devices", "0"],
    "data that do not exist": ["data.params.train.target=tiny_training.Nothing"],
    "data that cannot be built": ["data.params.train.params.size=0"],
    "an unknown argument": ["lightning.trainer.max_epoch=3"],
    "a callback that cannot be built": ["lightning.callbacks.x.target=tiny_training.Nothing"],
}


@pytest.mark.parametrize("words", FAILING.values(), ids=FAILING)
def test_a_finished_run_stays_as_it_was(run: Path, words: list[str]) -> None:
    before = content(run)
    with contextlib.suppress(RuntimeError):  # weights of other shapes
        assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=3", *words]) == 1
    assert content(run) == before
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_finished_run_stays_as_it_was_if_the_first_batch_fails(run: Path, monkeypatch) -> None:
    def fail(self: TinyDataset, index: int) -> None:
        raise OSError("the data cannot be read")

    monkeypatch.setattr(TinyDataset, "__getitem__", fail)
    before = content(run)
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=3"]) == 1
    assert content(run) == before


def test_a_damaged_checkpoint_leaves_the_run_as_it_was(run: Path) -> None:
    (run / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    before = content(run)
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=3"]) == 1
    assert content(run) == before


def test_a_continued_run_has_a_second_pair_of_configs_and_a_new_record(run: Path) -> None:
    started = json.loads((run / "run.json").read_text())["started"]
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["started"], record["global_step"]) == ("finished", started, 12)
    assert len(list((run / "configs").glob("*.yaml"))) in (2, 4)  # 2 within one second
    assert (run / "log.txt").read_text().count("run folder") == 2


def test_a_failure_in_a_step_is_recorded(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(TinyModel, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"])
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("words", FAILING.values(), ids=FAILING)
def test_a_new_run_that_fails_before_its_first_step_leaves_no_folder(config: Path, tmp_path: Path, words) -> None:
    if "width" in words[0]:  # fits a new run
        words = ["model.params.ckpt_path=nothing.ckpt", "model.params.no_such=1"]
    assert front_door.main(["-b", str(config), "-t", "-l", str(tmp_path / "logs"), *words]) == 1
    assert not (tmp_path / "logs").exists()


def test_an_interrupt_before_the_first_step_leaves_no_folder(config: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(self: TinyModel) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyModel, "configure_optimizers", interrupt)
    assert front_door.main(["-b", str(config), "-t", "-l", str(tmp_path / "logs")]) == 130
    assert not (tmp_path / "logs").exists()


def test_a_finished_run_without_further_steps_stays_finished(run: Path) -> None:
    assert front_door.main(["-r", str(run), "-t"]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
