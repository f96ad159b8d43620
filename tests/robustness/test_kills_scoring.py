"""Scoring that is killed at random moments, again and again: nothing is lost, doubled or left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("SCORING_KILLS", "30"))
SPACE = {"factor_names": np.array(["size", "hue", "x"]), "factor_sizes": np.array([3, 4, 5])}


def write_runs(logdir: Path) -> None:
    """Write eight representations (60, 4) of two runs."""
    for number in range(8):
        latents = np.random.default_rng(number).normal(size=(60, 4)) + np.arange(60)[:, None] % 5
        folder = logdir / f"run_s{number % 2}" / "dis_repre"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"epoch={number:06d}.npz", latents=latents.astype(np.float32), num_samples=number, **SPACE)


def start(logdir: Path, scratch: Path, errors: Path) -> subprocess.Popen:
    with errors.open("w") as stream:
        return subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "run_para_metrics.py"),
                "-p",
                "2",
                "-l",
                str(logdir),
                "--metrics",
                "mig",
                "dci",
            ],
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
        )


def kill(process: subprocess.Popen, draw: random.Random) -> str:
    """Kill the command or one of its workers at a random moment; return what was killed, empty if it had ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=draw.uniform(0.2, 4.0))
        return ""
    number, kind = draw.choice([(signal.SIGKILL, "command"), (signal.SIGTERM, "command"), (signal.SIGKILL, "worker")])
    victims: list = [process]
    if kind == "worker":
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children()
            victims = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    if not victims:
        return ""
    draw.choice(victims).send_signal(number)
    return f"{kind} {number.name}"


def wait_until_gone(group: int) -> None:
    for _ in range(400):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes of group {group} are still running")


def content(logdir: Path) -> dict[str, object]:
    """Return score files, results.json and the results in records."""
    found: dict[str, object] = {}
    for path in sorted(logdir.rglob("*.json")):
        entry = json.loads(path.read_text())
        parts = entry.get("parts")
        found[str(path.relative_to(logdir))] = entry if parts is None else {key: parts[key]["result"] for key in parts}
    return found


def leftovers(logdir: Path) -> list[Path]:
    known = (".json", ".npz")
    return [path for path in logdir.rglob("*") if path.is_file() and (path.suffix not in known or path.name[0] == ".")]


@pytest.mark.slow
def test_a_killed_command_loses_and_leaves_nothing(tmp_path: Path) -> None:
    draw, scratch, errors = random.Random(16), tmp_path / "scratch", tmp_path / "errors.txt"
    scratch.mkdir()
    write_runs(tmp_path / "whole")
    assert start(tmp_path / "whole", scratch, errors).wait() == 0
    expected = content(tmp_path / "whole")
    assert len(expected) == 2 * 8 + 2
    kills: list[str] = []
    while len(kills) < NUM_KILLS:
        logdir = tmp_path / f"round{len(kills)}"
        write_runs(logdir)
        code, scored = 1, []
        while code != 0:
            process = start(logdir, scratch, errors)
            if len(kills) < NUM_KILLS:
                kills += filter(None, [kill(process, draw)])
            code = process.wait(timeout=600)
            wait_until_gone(process.pid)
            text = errors.read_text()
            assert code in (0, -9, -15, 130) and "Traceback" not in text, text
            scored += [line for line in text.splitlines() if line.endswith("scored")]
        assert content(logdir) == expected
        assert len(scored) == len(set(scored)), "no file is scored twice"
        assert leftovers(logdir) == [] and list(scratch.iterdir()) == []
    assert {"command SIGKILL", "command SIGTERM", "worker SIGKILL"} <= set(kills)


@pytest.mark.slow
def test_two_commands_score_each_file_once(tmp_path: Path) -> None:
    write_runs(tmp_path / "logs")
    (tmp_path / "scratch").mkdir()
    errors = [tmp_path / "0.txt", tmp_path / "1.txt"]
    commands = [start(tmp_path / "logs", tmp_path / "scratch", path) for path in errors]
    assert [command.wait() for command in commands] == [0, 0]
    text = "".join(path.read_text() for path in errors)
    assert sum(line.endswith("scored") for line in text.splitlines()) == 8
    assert "waiting for process" in text
    assert leftovers(tmp_path / "logs") == [] and list((tmp_path / "scratch").iterdir()) == []
