"""Jobs that raise, are killed or leave do not disturb the others."""

from __future__ import annotations

import time

import pytest
import score_cases as cases

from ldm.scoring.workers import Job, WorkerPool


def test_every_job_gets_its_own_outcome(tmp_path):
    with WorkerPool(2) as pool:
        for number in range(4):
            pool.submit(Job(number, cases.square, (number,)))
        pool.submit(Job("raises", cases.fail, ("bad   value",)))
        pool.submit(Job("killed", cases.kill_itself, (None, None, None)))
        pool.submit(Job("leaves", cases.leave, ()))
        pool.submit(Job("killed once", cases.die_once, (tmp_path / "mark",)))
        pool.submit(Job("threads", cases.environment, ()))
        outcomes = {outcome.job.key: outcome for outcome in pool.outcomes()}
    assert [outcomes[number].result for number in range(4)] == [0, 1, 4, 9]
    assert outcomes["raises"].error.startswith("ValueError: bad value (score_cases.py:")
    assert "killed 2 times (signal SIGKILL)" in outcomes["killed"].error
    assert "exit status 3" in outcomes["leaves"].error
    assert outcomes["killed once"].result == "second attempt"
    assert outcomes["threads"].result == "1"


def test_order_follows_priority_and_jobs_may_join_later():
    with WorkerPool(1) as pool:
        for number in (1, 3, 2):
            pool.submit(Job(number, cases.square, (number,)), priority=number)
        found = []
        for outcome in pool.outcomes():
            found.append(outcome.result)
            if outcome.result == 1:
                pool.submit(Job("late", cases.square, (5,)))
    assert found == [9, 4, 1, 25]


def test_leaving_ends_running_jobs_at_once():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), WorkerPool(1) as pool:
        pool.submit(Job("quick", cases.square, (2,)), priority=1)
        pool.submit(Job("long", cases.sleep_long, ()))
        for _ in pool.outcomes():
            pool._hand_out()  # the long job runs now
            raise KeyboardInterrupt
    assert time.monotonic() - started < 30


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        WorkerPool(0)
