"""Two processes cannot write to one run; locks of killed processes do not block."""

from __future__ import annotations

import errno
import fcntl
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

# The child prints, not the parent: at its first line it has closed its copy of the lock's descriptor.
HOLD_AND_FORK = (
    "import os, sys, time; from pathlib import Path; from ldm.runs.lock import exclusive\n"
    "with exclusive(Path(sys.argv[1]), 'run'):\n"
    "    if os.fork(): time.sleep(60)\n"
    "    print('locked', flush=True); time.sleep(3); os._exit(0)"
)


def hold(path: Path, seconds: float = 60, code: str = HOLD) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(path), str(seconds)]
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


def test_processes_of_a_killed_owner_do_not_keep_the_lock(tmp_path: Path) -> None:
    """Loader workers outlive a killed training by some seconds."""
    process = hold(tmp_path / ".lock", code=HOLD_AND_FORK)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with exclusive(tmp_path / ".lock", "run") as was_held:
        assert not was_held


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


def test_a_file_system_without_flock_is_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    """A lock file whose existence is the lock would stay after a kill and block the run."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        with exclusive(tmp_path / ".lock", "run") as was_held:
            assert not was_held
    assert "run: not protected against a second process (" in caplog.text


@pytest.mark.parametrize("wait", [False, True])
def test_a_lock_has_one_owner_at_a_time(tmp_path: Path, wait: bool) -> None:
    """Four processes take a lock that is removed at each release; two owners would both find the other's file."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ldm.runs.lock import exclusive; from ldm.util import UserError\n"
        "folder, wait = Path(sys.argv[1]), sys.argv[2] == 'True'\n"
        "for _ in range(40):\n"
        "    try:\n"
        "        with exclusive(folder / '.lock', 'run', wait):\n"
        "            (folder / 'owner').touch(exist_ok=False); time.sleep(0.002); (folder / 'owner').unlink()\n"
        "    except UserError: pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(wait)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
