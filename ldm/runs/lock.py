"""Locks against two processes that write to one run, recipe or score file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.util import UserError

logger = logging.getLogger(__name__)


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
    lock, was_held = FileLock(path, fallback_to_soft=False), False
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            was_held = True
            owner, stop = _owner_of(path)
            if not wait:
                raise UserError(f"{purpose}: in use by {owner}. Wait until it ends, or stop it with: {stop}") from None
            logger.warning("%s: waiting for %s", purpose, owner)
            lock.acquire()
        about = {"pid": os.getpid(), "host": platform.node(), "command": shlex.join(sys.argv)}
        with contextlib.suppress(OSError):  # a full disk, or Windows, which protects locked files
            path.write_text(json.dumps(about), encoding="utf-8")
    except (OSError, NotImplementedError) as error:
        logger.warning("%s: not protected against a second process (%s)", purpose, error)
    try:
        yield was_held
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # before the release: processes that wait for it open a new file
            lock.release()


def _owner_of(path: Path) -> tuple[str, str]:
    """Return the description of the process that has a lock, and how it is stopped."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host, command = owner["pid"], owner["host"], owner["command"]
    except (OSError, ValueError, LookupError, TypeError):
        return "another process", "Ctrl-C"
    return f"process {pid} on {host} ({command})", f"kill {pid}" + f" (on {host})" * (host != platform.node())
