"""Kills and interrupts at random moments: every file is still scored exactly once, and nothing is left over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import score_cases as cases

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "run_para_metrics.py"), "-p", "2", "--protocol", "fast", "-l"]
NUM_FILES = 12
NUM_KILLS = int(os.environ.get("SCORING_KILLS", "6"))  # half of them of the parent, half of a worker
TASKS = {"information", "beta_vae", "mig", "factor_vae", "dci/0", "dci/1", "dci/2"}


def write_runs(logdir: Path) -> None:
    """Write 12 files of two runs."""
    for number in range(NUM_FILES):
        latents = np.random.default_rng(number).normal(size=(60, 4)) + np.arange(60)[:, None] % 5
        cases.write_latents(logdir / f"run_s{number % 2}", epoch=number, step=number, latents=latents)


def score_files(logdir: Path) -> dict[str, Path]:
    return {
        path.relative_to(logdir).as_posix(): path for path in logdir.glob("run_s*/dis_metrics/protocol=fast/*.json")
    }


def results(logdir: Path) -> dict[str, dict[str, object]]:
    """Return the result of each task in all records, without the time it took."""
    records = logdir.glob("run_s*/dis_metrics/protocol=fast/records/*.json")
    return {
        path.relative_to(logdir).as_posix(): {
            name: entry["result"] for name, entry in json.loads(path.read_text())["parts"].items()
        }
        for path in records
    }


def wait_until_gone(group: int) -> float:
    """Wait for the end of all processes of a group; return the seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < 15:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return time.monotonic() - started
        time.sleep(0.05)
    raise AssertionError(f"processes of group {group} are still running")


def workers_of(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    return []


class Interrupted:
    """Runs the command in rounds of fresh files and kills it until all kills are used."""

    def __init__(self, folder: Path, kills: int) -> None:
        self.random = random.Random(0)
        self.folder, self.kills = folder, kills
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.killed: Counter[str] = Counter()
        self.longest_end = 0.0

    def run_round(self, logdir: Path) -> Counter[str]:
        """Start the command until it ends by itself; return how often each file was reported as scored."""
        reported: Counter[str] = Counter()
        while True:
            before = {name: path.stat().st_mtime_ns for name, path in score_files(logdir).items()}
            errors = self.folder / "errors.txt"
            with errors.open("w") as stream:
                command = subprocess.Popen(
                    [*COMMAND, str(logdir)],
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                    start_new_session=True,
                    env=os.environ | {"TMPDIR": str(self.scratch)},
                )
                self.kill_at_random(command)
                code = command.wait(timeout=120)
                self.longest_end = max(self.longest_end, wait_until_gone(command.pid))
            after = {name: path.stat().st_mtime_ns for name, path in score_files(logdir).items()}
            assert after | before == after, "a score file is never written again"
            reported.update(line for line in errors.read_text().splitlines() if line.endswith("scored"))
            if code == 0:
                return reported
            assert code == -9, errors.read_text()

    def kill_at_random(self, command: subprocess.Popen) -> None:
        """Kill workers, or the parent, until the parent is killed, has ended, or no kill is left."""
        while sum(self.killed.values()) < self.kills:
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(timeout=self.random.uniform(0.1, 3.0))
                return
            kind = "parent" if self.killed["parent"] <= self.killed["worker"] else "worker"
            victims = workers_of(command.pid) if kind == "worker" else [command]
            if victims:
                self.random.choice(victims).kill()
                self.killed[kind] += 1
            if kind == "parent":
                return


@pytest.mark.slow
def test_every_file_is_scored_exactly_once_whatever_is_killed(tmp_path):
    write_runs(tmp_path / "whole")
    subprocess.run([*COMMAND, str(tmp_path / "whole")], check=True, capture_output=True)
    expected = {name: path.read_bytes() for name, path in score_files(tmp_path / "whole").items()}
    assert len(expected) == NUM_FILES
    interrupted = Interrupted(tmp_path, NUM_KILLS)
    rounds = 0
    while sum(interrupted.killed.values()) < NUM_KILLS:
        logdir = tmp_path / f"round {rounds}"
        write_runs(logdir)
        reported = interrupted.run_round(logdir)
        rounds += 1
        assert {name: path.read_bytes() for name, path in score_files(logdir).items()} == expected
        assert results(logdir) == results(tmp_path / "whole")
        assert all(found.keys() == TASKS for found in results(logdir).values())
        assert max(reported.values()) == 1, "no file is scored twice"
        left = [path for path in logdir.rglob("records/*") if path.is_dir()]
        assert left == [] and list(interrupted.scratch.iterdir()) == [], "no temporary files are left"
    print(f"{dict(interrupted.killed)} killed in {rounds} rounds; longest end {interrupted.longest_end:.1f} s")


@pytest.mark.slow
def test_interrupts_at_any_moment_end_cleanly(tmp_path):
    moments, scratch, interrupted = random.Random(1), tmp_path / "scratch", 0
    scratch.mkdir()
    for number in range(8):
        logdir = tmp_path / str(number)
        write_runs(logdir)
        command = subprocess.Popen(
            [*COMMAND, str(logdir)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        expected = 0  # if it ends before it is interrupted
        try:
            command.wait(timeout=moments.uniform(0.5, 3.5))
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGINT) if number % 2 else command.terminate()
            expected, interrupted = 130, interrupted + 1
        errors = command.communicate(timeout=30)[1]
        assert command.returncode == expected and "Traceback" not in errors, errors
        wait_until_gone(command.pid)
        assert list(scratch.iterdir()) == []
    assert interrupted
