"""Jobs in local Dask workers: jobs that raise, are killed or exit do not disturb the others."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
import score_cases as cases

from ldm.scoring.engine import Engine, Job


def worker_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


def test_every_job_has_its_own_outcome(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with Engine(2, tmp_path / "workers") as engine:
        for number in range(4):
            engine.submit(Job(number, cases.square, (number,)))
        engine.submit(Job("raises", cases.fail, ("bad   value",)))
        engine.submit(Job("killed", cases.kill_itself, (None, None, None)))
        engine.submit(Job("exits", cases.leave, ()))
        engine.submit(Job("killed once", cases.die_once, (tmp_path / "mark",)))
        engine.submit(Job("threads", cases.environment, ()))
        found = list(engine.outcomes())
    outcomes = {outcome.job.key: outcome for outcome in found}
    assert len(found) == len(outcomes) == 9
    assert [outcomes[number].result for number in range(4)] == [0, 1, 4, 9]
    assert outcomes["raises"].error.startswith("ValueError: bad value (score_cases.py:")
    assert "worker process was killed 3 times" in outcomes["killed"].error
    assert "worker process was killed 3 times" in outcomes["exits"].error
    assert outcomes["killed once"].result == "second attempt"
    assert outcomes["threads"].result == ["1"] * 5, "set before NumPy is loaded, whatever the user's environment"
    assert worker_processes() == []


def test_a_job_that_kills_its_workers_fails_alone(tmp_path):
    with Engine(2, tmp_path) as engine:
        for number in range(40):
            engine.submit(Job(number, cases.square, (number,)))
            if number % 20 == 0:
                engine.submit(Job(f"killed {number}", cases.kill_itself, (None, None, None)))
        outcomes = {outcome.job.key: outcome for outcome in engine.outcomes()}
    assert [outcomes[number].result for number in range(40)] == [number**2 for number in range(40)]
    assert sum(outcome.error is not None for outcome in outcomes.values()) == 2


def test_order_follows_priority_and_jobs_may_be_added_later(tmp_path):
    with Engine(1, tmp_path) as engine:
        for number in (1, 3, 2):
            engine.submit(Job(number, cases.square, (number,)), priority=number)
        found = []
        for outcome in engine.outcomes():
            found.append(outcome.result)
            if outcome.result == 1:
                engine.submit(Job("late", cases.square, (5,)))
    assert found == [9, 4, 1, 25]


def test_exit_ends_running_jobs_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), Engine(2, tmp_path) as engine:
        engine.submit(Job("quick", cases.square, (2,)), priority=1)
        engine.submit(Job("long", cases.sleep_long, ()))
        for _ in engine.outcomes():
            processes = worker_processes()
            assert len(processes) == 2
            left = time.monotonic()
            raise KeyboardInterrupt
    assert time.monotonic() - left < 30
    assert worker_processes() == []


def test_interrupts_reach_the_main_process_alone(tmp_path):
    with Engine(1, tmp_path) as engine:
        engine.submit(Job("slow", time.sleep, (0.5,)))
        processes = worker_processes()
        assert processes
        for process in processes:
            process.send_signal(signal.SIGINT)
        assert [outcome.error for outcome in engine.outcomes()] == [None]


def test_at_least_one_worker(tmp_path):
    with pytest.raises(ValueError, match="expected at least 1"):
        Engine(0, tmp_path)
