"""Two processes cannot write to one run; locks of killed processes do not block."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from ldm.runs.lock import exclusive
from ldm.util import UserError

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from ldm.runs.lock import exclusive\n"
    "with exclusive(Path(sys.argv[1]), 'run'): print('locked', flush=True); time.sleep(float(sys.argv[2]))"
)


def hold(path: Path, seconds: float = 60) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = hold(path)
    with pytest.raises(UserError, match=rf"run: in use by process {process.pid} on .* \(-c .*kill {process.pid}"):
        with exclusive(path, "run"):
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with exclusive(path, "run") as was_held:
        assert not was_held
    assert not list(tmp_path.iterdir())


def test_a_second_process_can_wait(tmp_path: Path, caplog) -> None:
    process, started = hold(tmp_path / ".lock", 0.5), time.monotonic()
    with exclusive(tmp_path / ".lock", "scores of x", wait=True) as was_held:
        assert was_held and time.monotonic() - started > 0.2
    assert f"scores of x: waiting for process {process.pid}" in caplog.text
    process.wait()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_without_locks_is_a_warning(tmp_path: Path, monkeypatch, caplog, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with exclusive(tmp_path / ".lock", "run") as was_held:
        assert not was_held
    assert "run: not protected against a second process" in caplog.text
