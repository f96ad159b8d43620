"""Search for runs by name, and the resolution of ``-r`` to a run folder and a checkpoint."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import report_once
from ldm.runs.folder import RunFolder, last_checkpoint
from ldm.runs.records import RUN_FILE, read_json
from ldm.util import UserError

_ENTRIES = {"name": str, "status": str, "configs": list, "seed": int, "seconds": (int, float), "started": str}
_ROOT = Path(__file__).resolve().parents[2]
_DATA_FILES = ("world.yaml", "data.yaml")  # configs of data in the commands of other configs


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
                    try:
                        found.append((path, _read_record(path)))
                    except UserError as error:
                        copy = f"its checkpoint has a copy: python main.py -r {path} -t"
                        report_once(f"{error}. The run is left out; {copy}")
        yield from sorted(found, key=lambda run: (str(run[1].get("started", "")), run[0].name), reverse=True)


def _read_record(run: Path) -> dict[str, Any]:
    """Return the content of ``run.json``, empty if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    record = read_json(run / RUN_FILE, missing_ok=True)
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(record.get(name), (kind, type(None)))]
    if wrong or not all(isinstance(file, str) for file in record.get("configs") or ()):
        raise UserError(f"{run / RUN_FILE}: invalid {', '.join(wrong) or 'configs'}. Delete or restore the file")
    return record


def is_named(record: dict[str, Any], name: str) -> bool:
    """Return whether a run has that name, or was trained from the config ``folder/stem``."""
    if "/" not in name:
        return record.get("name") == name
    wanted = _config_parts(name)
    return any(_config_parts(file)[-len(wanted) :] == wanted for file in record.get("configs") or ())


def _config_parts(file: str) -> list[str]:
    """Return the parts of a config's path, with ``-`` and ``_`` treated as equal."""
    return file.removesuffix(".yaml").replace("-", "_").split("/")


def find_run(
    name: str, roots: Iterable[str | os.PathLike], files: Sequence[str] = (), data_file: str | None = None
) -> Path:
    """Return the newest finished run with that name; earlier roots take precedence.

    Args:
        name: the run's name (``-n``, or the stem of its config), without the time; or ``folder/stem`` of its config.
        roots: folders searched with all their subfolders.
        files: config files at hand, and
        data_file: the one of the training data, for the advice.

    Raises:
        UserError: no such run was found; the message lists the runs that exist.
    """
    searched = [str(root) for root in roots]
    others = []
    for path, record in list_runs(searched):
        status = record.get("status")
        if is_named(record, name) and status == "finished":
            return path
        advice = f"; continue it with: python main.py -r {path} -t" if is_named(record, name) else ""
        others.append(f"{path} ({record.get('name')}, {status}{advice})")
    listing = "".join(f"\n  {line}" for line in others[:10]) or " none"
    raise UserError(
        f"no finished run named {name!r} in {' or '.join(dict.fromkeys(searched))}. Train it first: "
        f"{_command_for(name, files, data_file)} -l {searched[0]}\nRuns found:{listing}"
    )


def _command_for(name: str, files: Sequence[str], data_file: str | None) -> str:
    """Return the command that trains a run of that name: the one in the head of its config, if there is one.

    Configs beside the files at hand are preferred; these and ``data_file`` replace data and first stage there.
    """
    beside = {Path(file).parent.name for file in files} or {"quickstart"}
    roots = [Path(), *(above for file in files for above in Path(file).absolute().parents), _ROOT]
    root = next((root for root in roots if any(root.glob(f"configs/**/{name}.yaml"))), Path())
    found = sorted(root.glob(f"configs/**/{name}.yaml"), key=lambda path: (path.parent.name not in beside, path))
    if not found:
        words = f"{name}.yaml -t" if "/" in name else f"CONFIG.yaml -t -n {name}"  # a name with "/" is that of a config
        return f"python main.py --base {f'{data_file} ' if data_file else ''}{words}"
    lines = found[0].read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#"))
    command = next((line for line in comments if line.startswith("python main.py")), "")
    words = command.split() or f"python main.py --base {found[0]} -t".split()
    at_hand = {key: file for file in files if (key := _alternatives(file))} | {"data": data_file}
    words = [at_hand.get(_alternatives(word)) or word for word in words]
    return " ".join(str(root / word) if (root / word).is_file() else word for word in words)


def _alternatives(file: str) -> str:
    """Return what the configs have in common of which a command names one, "data" or "first_stage"; else ""."""
    name = Path(file).name
    return "data" if name in _DATA_FILES else "first_stage" if name.startswith("first_stage_") else ""


@dataclass(frozen=True)
class Resume:
    """Run folder, checkpoint, configs and record of the run that ``-r`` continues."""

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
        runs = [str(run) for run, _ in list_runs([path.parent])]
        listing = f" Runs found there: {', '.join(runs[:5])}." if runs else ""
        raise UserError(f"-r {given} does not exist.{listing} Name a run folder or a checkpoint file")
    folder = RunFolder(path.absolute().parent.parent if path.is_file() else path)
    configs = tuple(sorted(folder.configs.glob("*.yaml")))
    if not configs and not any(folder.checkpoints.glob("*.ckpt")):
        raise UserError(
            f"-r {given}: expected <logdir>/<time>_<name> or <run>/checkpoints/<file>.ckpt, got a path without "
            f"{folder.configs}/*.yaml. Name the folder of a run"
        )
    checkpoint = path if path.is_file() else last_checkpoint(folder.path)
    lost = _lost_configs(configs) if configs else [folder.configs]
    problems, record = [f"{file} is missing or empty" for file in lost], {}
    try:
        record = _read_record(folder.path)
    except UserError as error:
        problems.append(str(error))
    if problems:
        from ldm.runs.checkpoint_io import read_checkpoint  # imports torch

        stored = read_checkpoint(checkpoint).get("run") or {}
        if lost and "config" not in stored:  # written by LDM, which has runs without a file for lightning
            if any(file.exists() or file.name.endswith("project.yaml") for file in lost):
                raise UserError(f"{problems[0]}, and {checkpoint} has no copy. Restore the file")
            problems, lost = problems[len(lost) :], []
        if problems:
            report_once(f"{'. '.join(problems)}. Using the copy in {checkpoint}")
        record = record or {name: stored[name] for name in stored if name != "config"}
        if lost:
            configs = (Path(tempfile.mkdtemp(), f"{checkpoint.name}.yaml"),)
            atexit.register(shutil.rmtree, configs[0].parent, ignore_errors=True)
            configs[0].write_text(json.dumps(stored["config"]), encoding="utf-8")
    return Resume(folder, checkpoint, configs, record)


def _lost_configs(configs: Sequence[Path]) -> list[Path]:
    """Return the files of the newest pair of configs, which replace all others, that are missing or empty."""
    stamp, _, kind = configs[-1].name.rpartition("-")
    names = ("lightning.yaml", "project.yaml")
    pair = [configs[-1].with_name(f"{stamp}-{name}") for name in names] if kind in names else [configs[-1]]
    return [file for file in pair if not file.is_file() or not re.search(rb"(?m)^[^#\s]", file.read_bytes())]
