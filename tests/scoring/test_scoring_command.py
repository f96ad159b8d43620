"""run_para_metrics.py as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases

from ldm.data.factors import FactorSpace

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "run_para_metrics.py")]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def write_slow_run(folder: Path) -> None:
    """Codes whose DCI takes many seconds."""
    space = FactorSpace(("a", "b"), (40, 50))
    latents = np.random.default_rng(0).normal(size=(space.size, 10)).astype(np.float32)
    cases.write_latents(folder, space=space, latents=latents)


def assert_nothing_left_running(group: int) -> None:
    """All processes of the group end within seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of group {group} are still running")


def test_help_answers_at_once():
    started = time.monotonic()
    found = run("--help")
    assert found.returncode == 0 and "examples:" in found.stdout
    assert time.monotonic() - started < 1.0


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\nsys.argv = ['run_para_metrics.py', '--help']\ntry:\n    runpy.run_path(sys.argv[0], "
        "run_name='__main__')\nexcept SystemExit:\n    sys.exit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_mistakes_are_answered_in_one_line(tmp_path):
    found = run("-l", tmp_path / "none")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {tmp_path / 'none'}: no such folder") and found.stderr.count("\n") == 1
    assert "expected at least 1, got 0" in run("-p", 0).stderr


def test_folders_without_anything_to_score(tmp_path):
    (tmp_path / "vq" / "checkpoints").mkdir(parents=True)
    found = run("-l", tmp_path)
    assert found.returncode == 0
    assert "No scores: no run" in found.stderr and "1 of 1 runs have no dis_repre/*.npz" in found.stderr


def test_damaged_file_sets_the_exit_status(tmp_path):
    path = cases.write_latents(tmp_path / "run")
    path.write_bytes(b"PK")
    found = run("-l", tmp_path)
    assert found.returncode == 1
    assert found.stderr.startswith(f"not scored: {path}: the file is damaged")


def test_termination_ends_as_cleanly_as_ctrl_c(tmp_path):
    write_slow_run(tmp_path / "run")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = subprocess.Popen(
        [*COMMAND, "-l", str(tmp_path), "-p", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    deadline = time.monotonic() + 60
    while not list(scratch.glob(".scores-*/0/units.npy")) and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    assert "rerun the same command to continue" in command.communicate(timeout=30)[1]
    assert command.returncode == 130
    assert list(scratch.glob(".scores-*")) == []
    assert_nothing_left_running(command.pid)


@pytest.mark.slow
def test_ctrl_c_ends_everything_cleanly(tmp_path):
    write_slow_run(tmp_path / "run")
    command = subprocess.Popen(
        [*COMMAND, "-l", str(tmp_path), "-p", "3"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # two processes are at work on DCI, the third shows progress
    records = tmp_path / "run/dis_metrics/records/100"
    deadline = time.monotonic() + 60
    while not list(records.glob("*.json")) and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    errors = command.communicate(timeout=30)[1]
    assert command.returncode == 130
    assert "rerun the same command to continue" in errors and "Traceback" not in errors
    assert list(records.glob("*.json")) and not (tmp_path / "run/dis_metrics/100.json").exists()
    assert_nothing_left_running(command.pid)


@pytest.mark.slow
def test_watching_picks_up_new_files(tmp_path):
    path = cases.write_latents(tmp_path / "run")
    path.write_bytes(b"PK")  # still being written
    old = cases.write_latents(tmp_path / "old")
    old.write_bytes(b"PK")
    os.utime(old, (0, 0))  # damaged for long
    command = subprocess.Popen(
        [*COMMAND, "-l", str(tmp_path), "-p", "2", "--watch", "0.2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        time.sleep(3)
        assert command.poll() is None
        cases.write_latents(tmp_path / "run")
        deadline = time.monotonic() + 90
        while not (tmp_path / "run/dis_metrics/100.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        command.send_signal(signal.SIGINT)
        errors = command.communicate(timeout=30)[1]
    assert (tmp_path / "run/dis_metrics/100.json").exists()
    assert errors.count("is damaged") == 1 and str(old) in errors, "reported once, not at every look"


@pytest.mark.slow
def test_published_protocol_end_to_end(tmp_path):
    for seed in (0, 1):
        cases.write_latents(tmp_path / f"2026-01-01T00-00-00_dis_s{seed}", epoch=3, step=900)
    found = run("-l", tmp_path, "-p", 2, "--csv", tmp_path / "all.csv")
    assert found.returncode == 0, found.stderr
    assert "FactorVAE" in found.stdout and "1.000 ± 0.000" in found.stdout
    content = json.loads((tmp_path / "2026-01-01T00-00-00_dis_s0/dis_metrics/900.json").read_text())
    assert content["factor_VAE"]["eval_accuracy"] == 1.0
    assert json.loads((tmp_path / "2026-01-01T00-00-00_dis_s1/results.json").read_text())["dci"] > 0.99
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 3
    assert (tmp_path / "2026-01-01T00-00-00_dis_s0/dis_metrics/records/900.json").is_file()
    assert run("-l", tmp_path).returncode == 0
