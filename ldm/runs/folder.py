"""A run's folder: its name, its files, its ``run.json``, and how a later command finds it again.

Layout of one run::

    <logdir>/<YYYY-mm-ddTHH-MM-SS>_<name><postfix>/
        run.json  results.json  log.txt
        checkpoints/epoch=000012.ckpt, last.ckpt
        configs/<now>-project.yaml, <now>-lightning.yaml
        testtube/version_0/metrics.csv
        images/<split>/...
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.util import UserError, atomic_write

DEFAULT_LOGDIR = "logs"
RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
LAST_CHECKPOINT = "last.ckpt"
TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder; nothing is created by looking at them."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def configs(self) -> Path:
        """Folder of the merged configs, one pair for each start of the run."""
        return self.path / "configs"

    @property
    def last(self) -> Path:
        """The newest checkpoint, rewritten while training goes on."""
        return self.checkpoints / LAST_CHECKPOINT


def now_text() -> str:
    """Return the local time as it stands in run and config names."""
    return datetime.datetime.now().strftime(TIME_FORMAT)


def utc_now() -> str:
    """Return the time in UTC as ISO text, for ``run.json``."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def new_run_folder(logdir: str | os.PathLike, name: str, now: str) -> RunFolder:
    """Create ``<logdir>/<now>_<name>``; a second run of the same second gets ``-2`` behind its name.

    Raises:
        UserError: the folder cannot be created.
    """
    for number in range(1, 100):
        path = Path(logdir) / (f"{now}_{name}" + (f"-{number}" if number > 1 else ""))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be created: {error}. Choose another one with -l") from error
        return RunFolder(path)
    raise UserError(f"{logdir} already holds 99 runs named {now}_{name}; give the run another name with -n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        UserError: the file is not a JSON mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it or restore it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a mapping; delete it or restore it")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON mapping in one step, readable by eye."""
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")


def update_run(run_dir: str | os.PathLike, **entries: Any) -> dict[str, Any]:
    """Merge entries into ``run.json`` and return the whole record."""
    return _merge(Path(run_dir) / RUN_FILE, entries)


def update_results(run_dir: str | os.PathLike, **figures: Any) -> dict[str, Any]:
    """Merge figures (psnr, clip_accuracy, factor_vae, ...) into ``results.json`` and return all of them.

    Args:
        run_dir: the run's folder.
        **figures: plain numbers, texts, lists or mappings.
    """
    return _merge(Path(run_dir) / RESULTS_FILE, figures)


def _merge(path: Path, entries: dict[str, Any]) -> dict[str, Any]:
    content = {**(read_json(path) if path.is_file() else {}), **entries}
    write_json(path, content)
    return content


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for key, package in (
        ("torch", "torch"),
        ("lightning", "pytorch-lightning"),
        ("numpy", "numpy"),
        ("open_clip", "open_clip_torch"),
    ):
        try:
            versions[key] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[key] = "not installed"
    return versions


def git_state() -> dict[str, Any]:
    """Return ``{"revision", "dirty"}`` of the source tree; empty when it is no git checkout."""
    source = Path(__file__).resolve().parents[2]

    def ask(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    if not (source / ".git").exists():
        return {}
    try:
        return {
            "revision": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def list_runs(roots: Iterable[str | os.PathLike]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield ``(run folder, run.json)`` of all runs below the roots, newest first within each root."""
    seen: set[Path] = set()
    for root in roots:
        found = []
        for folder, subfolders, files in os.walk(root):
            if RUN_FILE in files:
                subfolders.clear()
                path = Path(folder)
                if path.resolve() not in seen:
                    seen.add(path.resolve())
                    found.append((path, read_json(path / RUN_FILE)))
        yield from sorted(found, key=lambda run: (str(run[1].get("started", "")), run[0].name), reverse=True)


def is_named(record: dict[str, Any], name: str) -> bool:
    """Whether a run goes by that name: its own, or ``folder/stem`` of a config where stems alone are ambiguous."""
    if "/" not in name:
        return record.get("name") == name
    wanted = _config_parts(name)
    return any(_config_parts(file)[-len(wanted) :] == wanted for file in record.get("configs", ()))


def _config_parts(file: str) -> list[str]:
    """Split a config's path for comparing, regardless of ``-`` and ``_``."""
    return file.removesuffix(".yaml").replace("-", "_").split("/")


def find_run(name: str, roots: Iterable[str | os.PathLike]) -> Path:
    """Return the newest finished run with that name; earlier roots win.

    Args:
        name: the run's name (``-n``, or the stem of its config), without the time; or ``folder/stem`` of its config.
        roots: folders searched with all their subfolders.

    Raises:
        UserError: there is none; the runs that exist are listed.
    """
    places = [str(root) for root in roots]
    others = []
    for path, record in list_runs(places):
        status = record.get("status")
        if is_named(record, name) and status == "finished":
            return path
        advice = f"; continue it with: python main.py -r {path} -t" if is_named(record, name) else ""
        others.append(f"{path} ({record.get('name')}, {status}{advice})")
    listing = "".join(f"\n  {line}" for line in others[:10]) or " none"
    raise UserError(
        f"no finished run named {name!r} in {' or '.join(dict.fromkeys(places))}. Train it first: "
        f"{_command_for(name)} -l {places[0]}\nRuns there:{listing}"
    )


def _command_for(name: str) -> str:
    """The command that trains a run of that name: the one in the head of its config, if it has one."""
    config = next(iter(sorted(Path("configs").rglob(f"{name}.yaml"))), None)
    if config is None:
        return f"python main.py --base CONFIG.yaml -t -n {name}"
    comments = (line.lstrip("# ") for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in comments if line.startswith("python main.py")), f"python main.py --base {config} -t")


def last_checkpoint(run_dir: str | os.PathLike) -> Path:
    """Return ``last.ckpt`` of a run, or its newest checkpoint where there is none.

    Raises:
        UserError: the run has no checkpoint.
    """
    folder = RunFolder(Path(run_dir))
    if folder.last.is_file():
        return folder.last
    others = sorted(folder.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not others:
        raise UserError(
            f"run {run_dir} has no checkpoint in {folder.checkpoints}: it stopped before its first one. "
            "Start it again without -r"
        )
    return others[-1]


@dataclass(frozen=True)
class Resume:
    """Where a run continues: its folder, the checkpoint, the configs it was started with."""

    folder: RunFolder
    checkpoint: Path
    configs: tuple[Path, ...]
    record: dict[str, Any]


def resolve_resume(given: str | os.PathLike) -> Resume:
    """Resolve ``-r``: a run folder, or a checkpoint file two levels below one.

    Raises:
        UserError: the path, its ``configs/`` or its checkpoint does not exist.
    """
    path = Path(given)
    if not path.exists():
        runs = [str(run) for run, _ in list_runs([path.parent])] if path.parent.is_dir() else []
        listing = f" Runs there: {', '.join(runs[:5])}" if runs else ""
        raise UserError(f"-r {given} does not exist.{listing}")
    folder = RunFolder(path.absolute().parent.parent if path.is_file() else path)
    configs = tuple(sorted(folder.configs.glob("*.yaml")))
    if not configs:
        raise UserError(
            f"-r {given}: no configs/*.yaml in {folder.path}, so this is no run folder. "
            "Expected <logdir>/<time>_<name> or <run>/checkpoints/<file>.ckpt"
        )
    checkpoint = path if path.is_file() else last_checkpoint(folder.path)
    run_file = folder.path / RUN_FILE
    return Resume(folder, checkpoint, configs, read_json(run_file) if run_file.is_file() else {})
