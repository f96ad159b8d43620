"""Paths inside the folder of a run, and the names of run folders.

Layout of one run::

    <logdir>/<YYYY-mm-ddTHH-MM-SS>_<name><postfix>/
        run.json  results.json  log.txt
        checkpoints/epoch=000012.ckpt, last.ckpt
        configs/<now>-project.yaml, <now>-lightning.yaml
        testtube/version_0/metrics.csv
        losses.png
        images/<split>/...
"""

from __future__ import annotations

import datetime
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ldm.util import UserError

DEFAULT_LOGDIR = "logs"
LAST_CHECKPOINT = "last.ckpt"
TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of one run; nothing is created."""

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
        """The newest checkpoint, rewritten during training."""
        return self.checkpoints / LAST_CHECKPOINT


def name_problem(name: str, is_suffix: bool = False) -> str:
    """Return why a text cannot be part of the name of a run's folder; empty if it can.

    Spaces, letters of any language and signs such as ``$`` or ``[`` are accepted.

    Args:
        name: the text.
        is_suffix: whether it follows a name, so that it may begin with a dot or a dash.
    """
    is_wrong = any(sign in "/\\" or unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in name)
    if not (is_wrong or name.startswith("..") or (not is_suffix and name.startswith((".", "-")))):
        return ""
    start = "" if is_suffix else " and that does not begin with a dot or a dash"
    return f"expected a name without / and \\, control characters and a leading ..{start}, got {name!r}. Change it"


def now_text() -> str:
    """Return the local time in the format of run and config names."""
    return datetime.datetime.now().strftime(TIME_FORMAT)


def new_run_folder(logdir: str | os.PathLike, name: str, now: str) -> RunFolder:
    """Create ``<logdir>/<now>_<name>``; a second run of the same second gets the suffix ``-2``.

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
            raise UserError(f"{path}: cannot create the run folder ({error}). Choose another one with -l") from error
        return RunFolder(path)
    raise UserError(f"{logdir}: already contains 99 runs named {now}_{name}. Choose another name with -n")


def last_checkpoint(run_dir: str | os.PathLike) -> Path:
    """Return ``last.ckpt`` of a run, or its newest checkpoint if that file does not exist.

    Raises:
        UserError: the run has no checkpoint.
    """
    folder = RunFolder(Path(run_dir))
    if folder.last.is_file():
        return folder.last
    others = sorted(
        (path for path in folder.checkpoints.glob("*.ckpt") if path.is_file()), key=lambda path: path.stat().st_mtime
    )
    if os.path.lexists(folder.last):
        others_text = f"Name another one: {others[-1]}" if others else "Restore it, or start the run again without -r"
        raise UserError(f"{folder.last}: expected a file, got a folder or a link without target. {others_text}")
    if not others:
        raise UserError(
            f"{folder.checkpoints}: no checkpoint; the run stopped before its first one. Start it again without -r"
        )
    return others[-1]
