"""Signals to a recipe are passed on to its stage, which saves, and the recipe waits. Two recipes exclude each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import main as front_door

ROOT = Path(__file__).parents[2]
STAGE = """
model: {base_learning_rate: 0.05, target: tiny_training.TinyModel}
data:
  target: main.DataModuleFromConfig
  params: {batch_size: 4, train: {target: tiny_training.TinyDataset}}
lightning:
  logger: csv
  trainer: {max_epochs: 100000, accelerator: cpu, enable_progress_bar: false}
  callbacks: {image_logger: null, representation_writer: null}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "stage.yaml").write_text(STAGE)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: tiny\nlogdir: {tmp_path}/logs\nscore: null\nstages:\n  - {{name: a, base: [{tmp_path}/stage.yaml]}}\n"
    )
    return path


def start(recipe: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), "--recipe", str(recipe)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_the_stage_which_saves(recipe: Path, name: str, capsys) -> None:
    logs, number = recipe.parent / "logs", signal.Signals[name]
    process = start(recipe)
    wait_for(lambda: list(logs.glob("*_a/checkpoints/last.ckpt")))
    (stage,) = psutil.Process(process.pid).children()
    assert front_door.main(["--recipe", str(recipe)]) == 1  # a second recipe
    assert f"in use by process {process.pid} on" in (text := capsys.readouterr().err) and "--recipe" in text
    (run,) = logs.glob("*_a")
    assert front_door.main(["-r", str(run), "-t"]) == 1  # a second process of the run
    assert f"in use by process {stage.pid} on" in capsys.readouterr().err
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number, errors
    assert "stopping after this step" in errors and "continue it with: python main.py --recipe" in errors
    assert not stage.is_running()
    assert '"interrupted"' in (run / "run.json").read_text()
    assert not [path for path in logs.rglob("*") if path.name.endswith((".tmp", "lock"))]


def test_a_signal_before_the_first_step_ends_the_command(recipe: Path, monkeypatch, capsys) -> None:
    import tiny_training

    monkeypatch.setattr(tiny_training.TinyModel, "configure_optimizers", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    stage, handler = str(recipe.parent / "stage.yaml"), signal.getsignal(signal.SIGTERM)
    assert front_door.main(["-b", stage, "-t", "-l", str(recipe.parent / "logs")]) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert not (recipe.parent / "logs").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
