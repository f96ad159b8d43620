"""Locks against two processes that write to one run, recipe or score file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.runs.disk import is_alive
from ldm.util import UserError

logger = logging.getLogger(__name__)

_HANDOVER_SECONDS = 10.0  # until the loader workers of a killed process have ended


@contextlib.contextmanager
def exclusive(path: Path, purpose: str, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, which is removed at the end; the lock of a process that was killed is released by the system.

    If the folder cannot be written or its file system has no locks, a warning is logged and there is no lock.

    Args:
        path: the lock file, in an existing folder.
        purpose: what the lock protects, for messages, such as "training of logs/x".
        wait: whether to wait for the other process instead of raising.

    Yields:
        Whether another process had the lock before.

    Raises:
        UserError: another process has the lock; the message contains its number, host and command.
    """
    lock, was_held, is_locked = FileLock(path, fallback_to_soft=False), False, False
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            was_held = True
            _acquire_later(lock, path, purpose, wait)
        is_locked = True
        owner = {"pid": os.getpid(), "host": platform.node(), "command": shlex.join(sys.argv)}
        with contextlib.suppress(OSError):  # a full disk, or Windows, which protects locked files
            path.write_text(json.dumps(owner), encoding="utf-8")
    except (OSError, NotImplementedError) as error:
        logger.warning("%s: not protected against a second process (%s)", purpose, error)
    try:
        yield was_held
    finally:
        if is_locked:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # before the release: processes that wait for it open a new file
            lock.release()


def _acquire_later(lock: FileLock, path: Path, purpose: str, wait: bool) -> None:
    """Acquire a lock that another process has, if it ends soon or is to be waited for."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host, command = int(owner["pid"]), str(owner["host"]), str(owner["command"])
        described = f"process {pid} on {host} ({command})"
    except (OSError, ValueError, KeyError, TypeError):
        pid, host, described = 0, platform.node(), "another process"
    is_here = host == platform.node()
    if wait:
        logger.warning("%s: waiting for %s", purpose, described)
    has_ended = is_here and not (pid and is_alive(pid, time.time()))
    try:
        lock.acquire(timeout=-1 if wait else _HANDOVER_SECONDS if has_ended else 0)
    except Timeout as error:
        stop = f"kill {pid}" + ("" if is_here else f" (on {host})") if pid else "Ctrl-C"
        raise UserError(f"{purpose}: in use by {described}. Wait until it ends, or stop it with: {stop}") from error
