"""Folders that are written: permissions, full disks, and temporary files of processes that were killed."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from ldm.util import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_OWNED = re.compile(r"\..*?(\d+)@([^@]*)@\w+(?:\.tmp)?")  # names with ldm.util.owner_mark
_UNOWNED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.scores-\d+-.+")  # names of earlier versions
_DAY = 24 * 3600.0


def is_full(error: BaseException) -> bool:
    """Return whether a failed write was caused by a full disk; torch reports that as a ``RuntimeError``."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # torch reports a short write only by the name of its writer, "inline_container".
    return isinstance(error, (OSError, RuntimeError)) and bool(re.search("No space left|inline_container", str(error)))


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk of a folder, which may not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def full_message(
    error: BaseException, folders: Iterable[str | os.PathLike] = (), then: str = "", lost: str = ""
) -> str:
    """Return the message for a full disk: the folder of the file in the error, its free space and the next step.

    Args:
        error: the error of writing.
        folders: folders that are written; if the error names no file, the disk is that of one of these, the temporary
            and the working folder with the least free space.
        then: the next step once there is space; it replaces that of commands with temporary or output folders.
        lost: what was not written.
    """
    temporary = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    if isinstance(error, OSError) and error.filename is not None:
        folder = Path(os.fsdecode(error.filename)).absolute().parent
    else:
        folder = min(map(Path, (*folders, temporary, ".")), key=free_bytes)
    below = f"{folder.resolve()}/".removeprefix(f"{temporary.resolve()}/")
    if not then and (not below or below.startswith((".scores-", "tmp"))):
        then = "or set the environment variable TMPDIR to a folder on another disk, then rerun the command"
    then = then or "or choose a folder on another disk (-l, --out, --output), then rerun the command"
    start = f"no space left on the disk of {folder} ({free_bytes(folder) / 1e6:.1f} MB free){lost and f': {lost}'}"
    return f"{start}. Free some space there, {then}"


def refused_message(error: OSError) -> str | None:
    """Return the message for missing permissions or a read-only disk; None for other errors."""
    if error.errno not in _REFUSED or error.filename is None:
        return None
    advice = "Change its permissions, or choose another folder (-l, --out, --output)"
    return f"{os.fsdecode(error.filename)}: cannot be opened or written ({error.strerror}). {advice}"


def require_writable(folder: str | os.PathLike, advice: str) -> None:
    """Create and remove a file in a folder, or in the nearest one above it that exists.

    Raises:
        UserError: no file can be written; the message ends with ``advice``.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(Path(folder))) as stream:
            stream.write(b"\0")
    except OSError as error:
        if is_full(error):
            raise UserError(full_message(error, [folder])) from error
        raise UserError(f"{folder}: cannot be written ({error.strerror}). {advice}") from error


def _existing(folder: Path) -> Path:
    path = folder.absolute()
    return next((each for each in (path, *path.parents) if each.is_dir()), path)


def remove_leftovers(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove temporary files and folders of processes that have ended.

    Those of living processes stay, and those of other computers or without an owner that are newer than a day.

    Args:
        folder: where they are searched.
        pattern: glob pattern of their names.
    """
    with contextlib.suppress(FileNotFoundError):  # a folder that another process has just removed
        for path in folder.glob(pattern):
            if _is_left(path):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left(path: Path) -> bool:
    owner = _OWNED.fullmatch(path.name)
    if owner is None and not _UNOWNED.fullmatch(path.name):
        return False
    try:
        changed = path.lstat().st_mtime
    except FileNotFoundError:  # another process has just renamed or removed it
        return False
    if owner is None or owner[2] != platform.node():
        return changed < time.time() - _DAY
    try:
        process = psutil.Process(int(owner[1]))
        # a process that is younger than the file has taken the number of its owner
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > changed + 1.0
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
