"""Where a data set lies: ``path:`` of its config, else the folder in the environment variable ``DATA_ROOT``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.util import UserError


def data_root() -> Path:
    """The folder of all data sets: ``DATA_ROOT``, else ``data`` in the current folder."""
    return Path(os.environ.get("DATA_ROOT") or "data").expanduser()


def find_source(
    name: str,
    path: str | os.PathLike | None,
    places: Sequence[str],
    next_step: str,
    accept: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """The file or folder that holds a data set.

    Args:
        name: of the data set, for the message.
        path: the source itself or a folder above it; None takes ``data_root``.
        places: where the source may lie in such a folder, the first one first.
        next_step: where else to get it, for the message.
        accept: whether something is the source.

    Raises:
        UserError: nowhere found; the message lists where it was sought.
    """
    root = data_root() if path is None else Path(path).expanduser()
    sought = [root, *(root / place for place in places)] if path is not None else [root / place for place in places]
    for candidate in sought:
        if accept(candidate):
            return candidate
    origin = f"path: {path}" if path is not None else f"DATA_ROOT={os.environ.get('DATA_ROOT') or '(not set)'}"
    raise UserError(
        f"{name} not found ({origin}); sought {', '.join(map(str, sought))}. Set path: or DATA_ROOT to "
        f"its folder, {next_step}"
    )
