"""JSON records of a run: ``run.json`` (how it was started and ended) and ``results.json`` (its figures)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError, atomic_write

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
REASON = "reason"  # entry of a mapping: why a figure in it is null
_PACKAGES = {"torch": "torch", "lightning": "pytorch-lightning", "numpy": "numpy", "open_clip": "open_clip_torch"}


def utc_now() -> str:
    """Return the time in UTC in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Read a JSON mapping; with ``missing_ok``, a missing file is an empty one.

    Raises:
        UserError: the file is not a JSON mapping.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Change its permissions") from error
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). Delete or restore the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping, got a {type(content).__name__}. Delete or restore the file")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON mapping atomically, with indentation; see ``plain``."""
    with atomic_write(path) as stream:
        json.dump(plain(content), stream, indent=2, allow_nan=False)
        stream.write("\n")


def plain(value: Any) -> Any:
    """Return a value as JSON types, in which numbers that are not finite are None.

    The mapping that contains such a number gets the entry ``"reason": {name: text}``.

    Example:
        >>> plain({"mig": float("nan"), "sap": 0.5})
        {'mig': None, 'sap': 0.5, 'reason': {'mig': 'nan'}}
    """
    if isinstance(value, dict):
        content = {str(key): plain(entry) for key, entry in value.items()}
        reasons = {str(name): text for name, entry in value.items() if (text := _not_finite(entry))}
        given = content.get(REASON) if isinstance(content.get(REASON), dict) else {}
        return content | ({REASON: given | reasons} if reasons else {})
    value = _unwrapped(value)
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if _not_finite(value) else value


def _not_finite(value: Any) -> str:
    """Return "nan" or "inf" if a number is not finite, or a list contains such a number; else an empty text."""
    value = _unwrapped(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(dict.fromkeys(filter(None, map(_not_finite, value))))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else ""


def _unwrapped(value: Any) -> Any:
    """Return arrays and scalars of numpy as lists and numbers; numpy is not imported, which would delay ``--help``."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def update_run(run_dir: str | os.PathLike, **entries: Any) -> dict[str, Any]:
    """Merge entries into ``run.json`` and return the whole record."""
    return _merge(Path(run_dir) / RUN_FILE, entries)


def update_results(run_dir: str | os.PathLike, **figures: Any) -> dict[str, Any]:
    """Merge figures (psnr, clip_accuracy, factor_vae, ...) into ``results.json`` and return all of them.

    Args:
        run_dir: folder of the run.
        **figures: plain numbers, texts, lists or mappings.
    """
    return _merge(Path(run_dir) / RESULTS_FILE, figures)


def _merge(path: Path, entries: dict[str, Any]) -> dict[str, Any]:
    content = read_json(path, missing_ok=True)
    reasons = content.pop(REASON, {})
    reasons = {name: text for name, text in reasons.items() if name not in entries}
    content = plain({**content, **entries, **({REASON: reasons} if reasons else {})})
    write_json(path, content)
    return content


def collect_versions(packages: Mapping[str, str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    versions = {"python": platform.python_version()}
    for key, package in packages.items():
        try:
            versions[key] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[key] = "not installed"
    return versions


def git_state() -> dict[str, Any]:
    """Return ``{"revision", "dirty"}`` of the source tree; empty if it is not a git checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return {}

    def git(*words: str) -> str:
        command = ["git", "-C", str(source), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {}
