"""A training that was stopped at any batch, by a signal or an error, continues as if it had not been stopped."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_cases import CASES, assert_equal, remains, write_config

import main as front_door

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function from the name of a case to its config and its uninterrupted run, which is trained once."""

    @functools.cache
    def reference(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        config = write_config(name, folder / "config.yaml")
        assert front_door.main(["-b", str(config), "-t", "-l", str(folder)]) == 0
        return config, next(folder.glob("*_config"))

    return reference


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "steps")]
VALIDATED = {"plain": [2, 5, 8, 12, 15, 18], "latent": [0, 1, 2, 3, 4, 5], "adversarial": [1, 3, 5, 7], "steps": [2, 5]}


@pytest.mark.parametrize("name", ["latent", "adversarial", *SLOW])
def test_validations_and_checkpoints_fall_between_steps(name: str, references: Any) -> None:
    rows, _, progress = remains(references(name)[1])
    accumulate = CASES[name][2]
    assert all(batches % accumulate == 0 or batches == 10 for batches in progress), progress
    steps = [int(dict(row)["step"]) for row in rows if "train/loss" in dict(row)]
    assert sorted(steps) == list(range(2 * -(-10 // accumulate)))
    validated = sorted(int(dict(row)["step"]) for row in rows if any(key.startswith("val/") for key in dict(row)))
    assert validated == VALIDATED[name]


STOPS = [("latent", 9, "after", "SIGTERM"), ("adversarial", 14, "before", "error")]
MORE_STOPS = [(6, "after", "SIGTERM"), (9, "after", "interrupt"), (14, "before", "error"), (16, "after", "error")]
MORE = [(name, *stop) for name in CASES for stop in MORE_STOPS if (name, *stop) not in STOPS]


@pytest.mark.parametrize(
    ("name", "batch", "hook", "reason"), [*STOPS, *(pytest.param(*stop, marks=pytest.mark.slow) for stop in MORE)]
)
def test_a_stopped_run_continues(
    name: str, batch: int, hook: str, reason: str, references: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reference = references(name)
    monkeypatch.setenv("STOP", f"{batch} {hook} {reason}")
    words = ["-b", str(config), "-t", "-l", str(tmp_path)]
    if reason == "error":
        with pytest.raises(ArithmeticError):
            front_door.main(words)
    else:
        assert front_door.main(words) in (130, 143)
    monkeypatch.setenv("STOP", "0 - -")
    (run,) = tmp_path.glob("*_config")
    assert front_door.main(["-r", str(run), "-t"]) == 0
    assert_equal(run, reference, CASES[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_continues_from_any_of_its_checkpoints(name: str, references: Any, tmp_path: Path) -> None:
    config, reference = references(name)
    assert front_door.main(["-b", str(config), "-t", "-l", str(tmp_path)]) == 0
    (run,) = tmp_path.glob("*_config")
    for checkpoint in random.Random(name).sample(sorted((run / "checkpoints").glob("step=*.ckpt")), 2):
        assert front_door.main(["-r", str(checkpoint), "-t"]) == 0
        assert_equal(run, reference, CASES[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_kills(name: str, seed: int, references: Any, tmp_path: Path) -> None:
    """Twenty runs are killed between their first checkpoint and their end; a third is killed again when resumed."""
    config, reference = references(name)
    rng = random.Random(f"{name} {seed}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "main.py"), "-b", str(config), "-t", "-l", str(tmp_path)]
    first = 2 * CASES[name][2] + 1  # after the first checkpoint; all cases validate at batch 16 or later
    batches = sorted(rng.sample(range(first, 17), rng.choice([1, 1, 2])))
    hooks = ["validation", "before", "after", "after"]
    for batch in batches:
        signal_name = rng.choice(["SIGTERM", "SIGKILL"])
        hook = rng.choice(hooks) if batch > first else "after"  # the first checkpoint is written when this batch begins
        stop = f"{batch} {hook} {signal_name}"
        killed = subprocess.run(command, env={**environment, "STOP": stop}, capture_output=True, text=True)
        assert killed.returncode == {"SIGTERM": 143, "SIGKILL": -9}[signal_name], (stop, killed.stderr)
        (run,) = tmp_path.glob("*_config")
        assert (run / "checkpoints/last.ckpt").is_file(), stop
        command = [sys.executable, str(ROOT / "main.py"), "-r", str(run), "-t"]
        hooks = ["before", "after"]  # the last validation may have been that of the first kill
    done = subprocess.run(command, env={**environment, "STOP": "0 - -"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal(run, reference, CASES[name][2])
