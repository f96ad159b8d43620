"""Small helpers every room may use: building objects from a config, errors for the user, atomic files."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


class ConfigError(ValueError):
    """A config says something that cannot be: the message names the file or key and the next step."""


class UserError(RuntimeError):
    """Something outside the code has to be repaired (a file, a weight, a disk); the message says how."""


def get_obj_from_str(path: str) -> Any:
    """Import ``package.module.Name``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object a ``{target, params}`` mapping describes."""
    return get_obj_from_str(config["target"])(**(config.get("params") or {}), **extra)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path`` and rename it over ``path`` only when all was written.

    A reader, a crash or a full disk therefore never sees or leaves half a file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
