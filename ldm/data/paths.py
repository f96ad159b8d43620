"""Paths of data sets (``path:`` of the config, else below ``DATA_ROOT``) and of this package's caches."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ldm.util import UserError

AnyPath = str | os.PathLike


def data_root() -> Path:
    """Return the folder of all data sets: ``DATA_ROOT``, else ``data`` in the working directory."""
    return Path(os.environ.get("DATA_ROOT") or "data").expanduser()


def cache_folder() -> Path:
    """Return the user's cache folder on this platform; ``XDG_CACHE_HOME`` overrides it on all of them."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "clip-disdiff"


def array_names(names: Iterable[str], folders: Iterable[str]) -> list[str]:
    """Return the relative paths of an array file, converted files first: each suffix, then folder, then name."""
    suffixes = (".npy", ".h5", ".npz")
    return [f"{folder}{name}{suffix}" for suffix, folder, name in itertools.product(suffixes, folders, names)]


def find_source(
    name: str,
    path: AnyPath | None,
    candidates: Sequence[str],
    next_step: str,
    accept: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """Return the file or folder that contains a data set.

    Args:
        name: name of the data set, for the message.
        path: the source itself or a folder above it; None takes ``data_root``.
        candidates: relative paths of the source in that folder, in order of preference.
        next_step: how to get the data set, for the message.
        accept: whether a path is the source.

    Raises:
        UserError: the source is not found; the message lists the paths that were tried.
    """
    root = data_root() if path is None else Path(path).expanduser()
    tried = [*([] if path is None else [root]), *(root / candidate for candidate in candidates)]
    for candidate in tried:
        if accept(candidate):
            return candidate
    origin = f"path: {path}" if path is not None else f"DATA_ROOT={os.environ.get('DATA_ROOT') or '(not set)'}"
    raise UserError(
        f"{name} not found ({origin}): tried {', '.join(map(str, tried))}. Set path: or DATA_ROOT to its folder, "
        f"or {next_step}."
    )
