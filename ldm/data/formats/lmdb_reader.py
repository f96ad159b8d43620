"""Reading single keys of an LMDB, safely from several processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from ldm.util import UserError


def is_lmdb(path: Path) -> bool:
    """Whether a path looks like an LMDB: a folder with ``data.mdb``, or a file."""
    return path.is_file() or (path / "data.mdb").is_file()


def import_lmdb() -> Any:
    """The package lmdb.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lmdb
    except ModuleNotFoundError as err:
        raise UserError(
            "LMDB data sets need the package lmdb: pip install 'clip-disdiff[lmdb]' (or pip install lmdb)"
        ) from err
    return lmdb


_environments: dict[str, Any] = {}
_environments_lock = threading.RLock()


def _close_before_fork() -> None:
    """lmdb opens a file only once per process and counts a forked child as the same one: so none stays open
    while worker processes are started; each process opens its own when it reads next."""
    _environments_lock.acquire()
    for environment in _environments.values():
        environment.close()
    _environments.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_close_before_fork, after_in_parent=_environments_lock.release, after_in_child=_environments_lock.release
    )


def _environment(path: str) -> Any:
    """The LMDB at ``path``, shared by all readers of this process; to be called under the lock."""
    if path not in _environments:
        _environments[path] = _open_checked(path)
    return _environments[path]


def _open_checked(path: str) -> Any:
    lmdb = import_lmdb()
    folder = os.path.isdir(path)
    try:
        environment = lmdb.open(
            path, subdir=folder, readonly=True, lock=False, readahead=False, meminit=False, max_readers=32
        )
    except lmdb.Error as err:
        raise UserError(
            f"{path} cannot be opened as LMDB ({err}); set path: (or the environment variable "
            "DB_PATH) to an LMDB such as 'python scripts/dataset.py write' makes"
        ) from err
    found = os.path.getsize(os.path.join(path, "data.mdb") if folder else path)
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if found < expected:  # reading beyond the end of a mapped file would kill the process without a word
        environment.close()
        raise UserError(
            f"{path} has {found} bytes, expected at least {expected}: it is truncated. Copy or write it anew"
        )
    return environment


class LMDBReader:
    """Reads the keys of one LMDB; may be sent to worker processes.

    Args:
        path: folder or file of the LMDB.
        resolution: as in the keys; None where they say ``None``.
        zfill: digits of the index in the keys.
    """

    def __init__(self, path: str | os.PathLike, resolution: int | None, zfill: int = 7) -> None:
        self.path, self.resolution, self.zfill = os.path.abspath(path), resolution, zfill

    def get(self, key: str) -> bytes | None:
        """The value of ``key``, None where it is missing."""
        lmdb = import_lmdb()
        try:
            with _environments_lock, _environment(self.path).begin(write=False) as transaction:
                return transaction.get(key.encode())
        except lmdb.Error as err:
            raise UserError(
                f"{self.path}: key {key!r} cannot be read ({err}); the LMDB is damaged, write it anew"
            ) from err

    def require(self, *keys: str) -> bytes:
        """The value of the first of ``keys`` that exists.

        Raises:
            UserError: none of them does.
        """
        for key in keys:
            value = self.get(key)
            if value is not None:
                return value
        named = " nor ".join(repr(key) for key in keys)
        raise UserError(
            f"{self.path} has no key {named}; check original_resolution (now {self.resolution}) and "
            "that the LMDB was written to its end"
        )

    def __len__(self) -> int:
        value = self.require("length")
        try:
            return int(value)
        except ValueError as err:
            raise UserError(f"{self.path}: key 'length' holds {value[:40]!r}, expected a number") from err

    def name(self, index: int) -> str:
        """``<resolution>-<index>``, the common part of an image's keys."""
        return f"{self.resolution}-{str(index).zfill(self.zfill)}"
