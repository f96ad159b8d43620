"""Broken files of runs, scores and checkpoints: each is one line that names the file and the next step."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import main as front_door
from ldm.errors import report_once
from ldm.runs.find import find_run
from ldm.scoring.command import run_scoring
from ldm.scoring.run import Options
from ldm.util import UserError

ROOT = Path(__file__).parents[2]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


TINY = """
model: {base_learning_rate: 0.05, target: broken_run_parts.Model, params: {}}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 4, train: {target: broken_run_parts.Rows}}
lightning:
  logger: csv
  trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
  callbacks: {image_logger: null, representation_writer: null}
"""
PARTS = """
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import Dataset


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": torch.sin(torch.arange(3.0) + index)}


class Model(pl.LightningModule):
    def __init__(self, ckpt_path=None):
        super().__init__()
        self.layer = nn.Linear(3, 1000)
        if ckpt_path:
            from ldm.modules.weights import read_state_dict

            self.load_state_dict(read_state_dict(ckpt_path))

    def training_step(self, batch, batch_idx):
        return self.layer(batch["image"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "broken_run_parts.py").write_text(PARTS)
    sys.path.insert(0, str(folder))
    (folder / "tiny.yaml").write_text(TINY)
    assert front_door.main(["-b", str(folder / "tiny.yaml"), "-t", "-n", "tiny", "-l", str(folder / "logs")]) == 0
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the run."""
    monkeypatch.syspath_prepend(str(trained))
    (source,) = (trained / "logs").iterdir()
    shutil.copytree(source, tmp_path / "logs" / source.name)
    shutil.copy(trained / "tiny.yaml", tmp_path)
    report_once.cache_clear()
    return tmp_path / "logs" / source.name


def one_line(text: str, *parts: str) -> None:
    """Check that an error is one line which contains some texts, and no traceback or advice to run code."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in text, text
    for part in parts:
        assert part in lines[0], lines[0]
    assert not re.search("weights_only|allow_pickle|trust", text), text


def write(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)]) and None


def flip(path: Path) -> None:
    """Change one bit in the largest array of a zip file."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda each: each.file_size)
    content = bytearray(path.read_bytes())
    content[part.header_offset + 300 + random.Random(5).randrange(part.file_size - 300)] ^= 4
    path.write_bytes(content)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.ckpt")


def pickle_code(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Evil(f"touch {path.parent}/executed")}))


def save_code(path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Evil(f"touch {path.parent}/executed")}, path)


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "empty": write(b""),
    "cut at the start": cut(0.01),
    **{f"cut {number}": cut(random.Random(number).uniform(0.05, 0.95)) for number in range(4)},
    "without its end": cut(0.999),
    "zeros": lambda path: write(bytes(path.stat().st_size))(path),
    "a flipped bit": flip,
    "html": write("<html><body>404 Not Found</body></html>"),
    "text": write("epoch: 1\n"),
    "json": write('{"state_dict": {}}'),
    "a pickle with code": pickle_code,
    "a file of torch with code": save_code,
    "a list": lambda path: torch.save([1, 2], path),
    "without weights": lambda path: torch.save({"optimizer": 1}, path),
    "a folder": become_folder,
    "a dangling link": become_dangling,
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_broken_checkpoint(run: Path, capsys, damage: Callable[[Path], None]) -> None:
    last = run / "checkpoints" / "last.ckpt"
    before = (run / "run.json").read_bytes()
    damage(last)
    capsys.readouterr()
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 1
    one_line(capsys.readouterr().err, str(last))
    assert front_door.main(["-b", str(run.parents[1] / "tiny.yaml"), "-t", f"model.params.ckpt_path={last}"]) == 1
    one_line(capsys.readouterr().err, str(last))
    assert not (last.parent / "executed").exists()
    assert (run / "run.json").read_bytes() == before


def test_a_damaged_checkpoint_offers_the_one_before_it(run: Path, capsys) -> None:
    last = run / "checkpoints" / "last.ckpt"
    (other,) = (path for path in last.parent.glob("*.ckpt") if path != last)
    flip(last)
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 1
    one_line(capsys.readouterr().err, "damaged", "CRC", f"python main.py -r {other} -t")
    assert front_door.main(["-r", str(other), "-t", "lightning.trainer.max_epochs=2"]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


RECORDS = {
    "cut": '{"name": "tiny", "sta',
    "empty": "",
    "a list": "[1, 2]",
    "binary": b"\x80\x04\x95\xff",
    "a number for a name": '{"name": 3, "status": "finished"}',
    "a text for the seed": '{"name": "tiny", "seed": "x"}',
    "configs that are a number": '{"name": "tiny", "configs": 5}',
    "configs that hold a list": '{"name": "tiny", "configs": [[1]]}',
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("content", RECORDS.values(), ids=RECORDS)
def test_a_broken_record_is_left_out_and_restored_from_the_checkpoint(run: Path, caplog, content) -> None:
    good = run.with_name("2000-01-01T00-00-00_good")
    shutil.copytree(run, good)
    record = json.loads((good / "run.json").read_text())
    (good / "run.json").write_text(json.dumps({**record, "name": "good"}))
    write(content)(run / "run.json")
    assert find_run("good", [run.parent]) == good
    assert find_run("good", [run.parent]) == good
    warnings = [entry.getMessage() for entry in caplog.records if str(run / "run.json") in entry.getMessage()]
    assert len(warnings) == 1 and f"python main.py -r {run} -t" in warnings[0]
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 0
    restored = json.loads((run / "run.json").read_text())
    assert {key: restored[key] for key in ("name", "seed", "status", "started")} == {
        key: record[key] for key in ("name", "seed", "status", "started")
    }


@pytest.mark.parametrize("content", ["model: {target: [", "- a\n- b\n", b"\x00\xff\xfe", "model:\n\ttarget: x\n"])
def test_a_broken_config(run: Path, capsys, content) -> None:
    project = next((run / "configs").glob("*-project.yaml"))
    write(content)(project)
    assert front_door.main(["-r", str(run), "-t"]) == 1
    one_line(capsys.readouterr().err, str(project))


@pytest.mark.parametrize("kinds", [["lightning"], ["project"], ["lightning", "project"]], ids="-".join)
@pytest.mark.parametrize(
    "damage", [write(""), write("# learning rate\n\n"), Path.unlink], ids=["empty", "head", "gone"]
)
def test_a_lost_config_is_taken_from_the_checkpoint(run: Path, capsys, caplog, kinds: list[str], damage) -> None:
    (stamp,) = {path.name.removesuffix("-project.yaml") for path in (run / "configs").glob("*-project.yaml")}
    for kind in kinds:
        damage(run / "configs" / f"{stamp}-{kind}.yaml")
    with caplog.at_level("INFO"):
        assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 0
    (line,) = [text for text in caplog.messages if "Using the copy in" in text]
    assert str(run / "configs") in line and "is missing or empty" in line and str(run / "checkpoints") in line
    assert not [text for text in caplog.messages if text.startswith("changed since the checkpoint")]
    assert json.loads((run / "run.json").read_text())["name"] == "tiny"
    newest = max((run / "configs").glob("*-lightning.yaml"))
    assert "max_epochs: 2" in newest.read_text()


def test_a_lost_config_without_a_copy_is_one_line(run: Path, capsys) -> None:
    last, project = run / "checkpoints" / "last.ckpt", next((run / "configs").glob("*-project.yaml"))
    content = torch.load(last, weights_only=True)
    del content["run"]
    torch.save(content, last)
    project.unlink()
    assert front_door.main(["-r", str(run), "-t"]) == 1
    one_line(capsys.readouterr().err, f"{project} is missing or empty, and {last} has no copy")


def test_an_empty_checkpoint_is_called_empty(run: Path, capsys) -> None:
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(b"")
    assert front_door.main(["-r", str(run), "-t", "lightning.trainer.max_epochs=2"]) == 1
    one_line(capsys.readouterr().err, f"{last} is damaged or truncated (the file is empty)")


@pytest.mark.parametrize("damage", [cut(0.5), flip, write(b""), pickle_code], ids=["cut", "flip", "empty", "code"])
def test_a_broken_checkpoint_of_an_earlier_stage(run: Path, capsys, damage) -> None:
    damage(run / "checkpoints" / "last.ckpt")
    config = run.parents[1] / "tiny.yaml"
    words = ["-t", "-l", str(run.parent), "model.params.ckpt_path=${last_ckpt:tiny}"]
    assert front_door.main(["-b", str(config), *words]) == 1
    one_line(capsys.readouterr().err, str(run / "checkpoints" / "last.ckpt"))
    assert list(run.parent.iterdir()) == [run] and not (run / "checkpoints" / "executed").exists()


SCRIPTS = {"sample_diffusion": ["-r"], "generate": ["--prompts", "x", "--checkpoint"]}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("damage", ["empty", "a flipped bit", "html", "a pickle with code", "a folder"])
def test_scripts_that_read_a_broken_checkpoint(
    run: Path, capsys, name: str, damage: str, tmp_path, monkeypatch
) -> None:
    import importlib.util

    monkeypatch.chdir(tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    CHECKPOINTS[damage](last)
    spec = importlib.util.spec_from_file_location(f"broken_{name}", ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = last if name == "generate" else run
    assert script.main([*SCRIPTS[name], str(given)]) == 1
    one_line(capsys.readouterr().err, str(last))
    assert not (last.parent / "executed").exists()


def write_latents(run: Path, **change: object) -> Path:
    latents = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    arrays = {"factor_names": np.array(["size", "hue", "x"]), "factor_sizes": np.array([3, 4, 5])}
    path = run / "dis_repre" / "epoch=000000.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"latents": latents, "num_samples": np.int64(7), **arrays, **change})
    os.utime(path, (1e9, 1e9))
    return path


ARRAYS: dict[str, Callable[[Path], object]] = {
    "cut": cut(0.6),
    "empty": write(b""),
    "html": write("<html></html>"),
    "objects": lambda path: write_latents(path.parents[1], latents=np.array([[Evil("false")] * 2] * 60, dtype=object)),
    "texts": lambda path: write_latents(path.parents[1], latents=np.array([["a"] * 4] * 60)),
    "object names": lambda path: write_latents(path.parents[1], factor_names=np.array([{}, 1, ""], dtype=object)),
    "a flipped bit": flip,
}


@pytest.mark.parametrize("damage", ARRAYS.values(), ids=ARRAYS)
def test_a_broken_representation(tmp_path: Path, caplog, damage) -> None:
    path = write_latents(tmp_path / "run_s0")
    damage(path)
    assert run_scoring(Options(tmp_path, metrics=["mig"])) == 1
    (text,) = (entry.getMessage() for entry in caplog.records if entry.getMessage().startswith("not scored"))
    assert str(path) in text and "\n" not in text and not re.search("allow_pickle|trust", text), text
    assert not list(tmp_path.rglob("*.lock"))


SCORES = {
    "half-written": '{"MIG": {"discrete_mig": 0.3',
    "a text for a number": '{"MIG": {"discrete_mig": "high"}}',
    "a list": "[0.3]",
    "binary": b"\x80\x04",
    "a number for a metric": '{"MIG": 0.3}',
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dis_metrics/7.json", "results.json", "run.json"])
@pytest.mark.parametrize("content", SCORES.values(), ids=SCORES)
def test_a_broken_score_file(tmp_path: Path, capsys, caplog, name: str, content) -> None:
    write_latents(tmp_path / "run_s0")
    write_latents(tmp_path / "run_s1")
    path = tmp_path / "run_s0" / name
    path.parent.mkdir(exist_ok=True)
    write(content)(path)
    try:
        run_scoring(Options(tmp_path, metrics=["mig"], csv=str(tmp_path / "table.csv")))
    except UserError as error:
        assert str(path) in str(error), error
    else:
        assert "run_s1" in (tmp_path / "table.csv").read_text()
        is_readable = isinstance(content, str) and content.startswith("{") and content.endswith("}")
        assert str(path) in caplog.text or (is_readable and name != "dis_metrics/7.json"), caplog.text
