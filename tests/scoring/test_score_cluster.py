"""A real Dask scheduler with two workers on the loopback; one of them is killed at work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import score_cases as cases

from ldm.metrics import Metric
from ldm.scoring.files import read_record, record_file
from ldm.util import UserError

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(port: int) -> None:
    """Wait until the port accepts connections."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the scheduler did not start")


@pytest.fixture
def cluster(tmp_path):
    """Address of a scheduler, and a function that starts a worker."""
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "10s",
        "DASK_TEMPORARY_DIRECTORY": str(tmp_path / "dask"),
    }
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> subprocess.Popen:
            log = stack.enter_context((tmp_path / f"{words[0]}-{len(os.listdir(tmp_path))}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]],
                env=environment,
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        port = address.rsplit(":")[-1]
        scheduler = start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show")
        wait_for(int(port))
        yield address, lambda: start("worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"), scheduler


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_doubles_nothing(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.scoring.engine.CONNECT_SECONDS", 6)
    address, start_worker, _ = cluster
    log = tmp_path / "started.txt"
    slow = Metric("Slow", cases.slow_size, "seconds", {"log": str(log)}, part=cases.slow_size, join=cases.total_size)
    logdir = tmp_path / "logs"
    for epoch in range(4):
        cases.write_latents(logdir / "run", epoch=epoch, step=epoch)
    victim, _ = start_worker(), start_worker()
    pids: list[int] = []

    def kill_half_way(done: float, total: float) -> None:
        if not pids and log.exists() and len(log.read_text().split()) >= 6:
            pids.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    metrics = {"slow": slow, "spread": cases.SPREAD}
    report = cases.score(logdir, 2, metrics=metrics, scheduler=address, on_progress=kill_half_way)
    assert pids, "the worker was killed while there was work"
    assert not report.failures
    assert Counter(path.name for path in report.written) == Counter(f"{epoch}.json" for epoch in range(4))
    for epoch in range(4):
        path = logdir / f"run/dis_metrics/{epoch}.json"
        assert json.loads(path.read_text())["Slow"] == {"total": 12}
        assert sorted(read_record(record_file(path))) == ["information", "slow/0", "slow/1", "slow/2", "spread"]
    starts = Counter(log.read_text().split())
    assert len(starts) == 12 and sum(starts.values()) <= 14, "only what the killed worker held was begun again"
    assert sorted(path.name for path in logdir.iterdir()) == ["run"], "nothing is left over"


def test_errors_on_the_cluster_cost_their_job_alone(cluster, tmp_path):
    address, start_worker, _ = cluster
    start_worker()
    cases.write_latents(tmp_path / "logs/run")
    metrics = {"spread": cases.SPREAD, "broken": Metric("Broken", cases.raise_error, "none")}
    report = cases.score(tmp_path / "logs", 1, metrics=metrics, scheduler=address)
    assert len(report.written) == 1
    assert "broken: ZeroDivisionError: no such number (score_cases.py" in report.failures[0].reason


@pytest.mark.slow
def test_a_lost_scheduler_ends_the_command_and_the_next_one_completes_it(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.scoring.engine.CONNECT_SECONDS", 3)
    address, start_worker, scheduler = cluster
    log = tmp_path / "started.txt"
    slow = Metric("Slow", cases.slow_size, "seconds", {"log": str(log)}, part=cases.slow_size, join=cases.total_size)
    for epoch in range(4):
        cases.write_latents(tmp_path / "logs/run", epoch=epoch, step=epoch)
    start_worker()

    def kill_half_way(done: float, total: float) -> None:
        if log.exists() and len(log.read_text().split()) >= 6:
            scheduler.kill()

    options = {"metrics": {"slow": slow}, "scheduler": address, "on_progress": kill_half_way}
    with pytest.raises(UserError, match="connection to .* is lost. Finished results are kept"):
        cases.score(tmp_path / "logs", 2, **options)
    finished = sorted((tmp_path / "logs/run/dis_metrics/records").rglob("*.json"))
    assert len(finished) >= 2
    again = cases.score(tmp_path / "logs", 2, metrics={"slow": slow})
    assert not again.failures and len(list((tmp_path / "logs/run/dis_metrics").glob("*.json"))) == 4
    assert len(log.read_text().split()) <= 12 + 1, "finished tasks are not computed again"


def test_no_scheduler_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.scoring.engine.CONNECT_SECONDS", 1)
    cases.write_latents(tmp_path / "run")
    started = time.monotonic()
    with pytest.raises(UserError, match="no Dask scheduler answers .* Start it with `dask scheduler`"):
        cases.score(tmp_path, 1, metrics={"s": cases.SPREAD}, scheduler=f"tcp://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 20
