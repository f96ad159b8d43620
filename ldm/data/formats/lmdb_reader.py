"""Reading of single keys of an LMDB in several processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.data.paths import AnyPath
from ldm.util import UserError


def is_lmdb(path: Path) -> bool:
    """Return whether a path may be an LMDB: a folder with ``data.mdb``, or a file."""
    return path.is_file() or (path / "data.mdb").is_file()


def import_lmdb() -> Any:
    """Return the package lmdb; raise a ``UserError`` if it is not installed."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("LMDB data sets need the package lmdb: pip install 'clip-disdiff[lmdb]' (or lmdb).") from error
    return lmdb


_environments: dict[str, Any] = {}
_environments_lock = threading.RLock()


def _close_before_fork() -> None:
    """Close all LMDBs of this process: lmdb opens a file only once per process and takes a forked child for the same
    one. Each process opens its own when it reads next."""
    _environments_lock.acquire()
    for environment in _environments.values():
        environment.close()
    _environments.clear()


if os.name == "posix":
    os.register_at_fork(
        before=_close_before_fork, after_in_parent=_environments_lock.release, after_in_child=_environments_lock.release
    )


def _environment(path: str) -> Any:
    """Return the LMDB at ``path``, shared by all readers of this process; the caller holds the lock."""
    if path in _environments:
        return _environments[path]
    lmdb = import_lmdb()
    folder = os.path.isdir(path)
    try:
        environment = lmdb.open(
            path, subdir=folder, readonly=True, lock=False, readahead=False, meminit=False, max_readers=32
        )
    except lmdb.Error as error:
        raise UserError(
            f"{path}: expected an LMDB, but opening failed ({error}). Set path: (or the environment variable DB_PATH) "
            "to an LMDB such as 'python scripts/dataset.py write' creates."
        ) from error
    found = os.path.getsize(os.path.join(path, "data.mdb") if folder else path)
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if found < expected:  # reading beyond the end of a mapped file would kill the process
        environment.close()
        raise UserError(f"{path}: expected at least {expected} bytes, got {found}. It is truncated: copy it again.")
    _environments[path] = environment
    return environment


class LMDBReader:
    """Reader of the keys of one LMDB; can be pickled to worker processes.

    Args:
        path: folder or file of the LMDB.
        resolution: resolution in the keys; None for keys that contain ``None``.
        zfill: number of digits of the index in the keys.
    """

    def __init__(self, path: AnyPath, resolution: int | None, zfill: int = 7) -> None:
        self.path, self.resolution, self.zfill = os.path.abspath(path), resolution, zfill

    def require(self, *keys: str) -> bytes:
        """Return the value of the first of ``keys`` that exists; raise a ``UserError`` if there is none."""
        for value in self._values(keys):
            if value is not None:
                return value
        raise UserError(
            f"{self.path} has no key {' or '.join(map(repr, keys))}. Check original_resolution (now "
            f"{self.resolution}), and that writing of the LMDB was completed."
        )

    def require_all(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of all ``keys``; raise a ``UserError`` if one does not exist."""
        return [self.require(key) if value is None else value for key, value in zip(keys, self._values(keys))]

    def _values(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the values of keys, read in one transaction; None for those that do not exist."""
        lmdb = import_lmdb()
        try:
            with _environments_lock, _environment(self.path).begin(write=False) as transaction:
                return [transaction.get(key.encode()) for key in keys]
        except lmdb.Error as error:
            raise UserError(
                f"{self.path}: keys {keys[0]!r} to {keys[-1]!r} cannot be read ({error}). The LMDB is damaged: write "
                "it again."
            ) from error

    def __len__(self) -> int:
        value = self.require("length")
        if not value.strip().isdigit():
            raise UserError(
                f"{self.path}: expected a number of images at key 'length', got {value[:40]!r}. Write the LMDB again."
            )
        return int(value)

    def name(self, index: int) -> str:
        """Return ``<resolution>-<index>``, the common part of an image's keys."""
        return f"{self.resolution}-{str(index).zfill(self.zfill)}"
