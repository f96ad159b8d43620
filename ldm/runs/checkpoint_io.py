"""Atomic checkpoint files, read without executing pickled code."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.errors import reason_of
from ldm.legacy.clip_guided import epoch_checkpoint
from ldm.modules.weights import DAMAGE, load_pickled
from ldm.runs.disk import full_message, is_full
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes to a temporary file and renames it, and reads with ``weights_only=True``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint; an existing file is replaced only after the new one is complete.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        try:
            with atomic_write(path, "wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
            raise _explain_write_error(error, Path(path)) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read one checkpoint; ``weights_only`` is always true, regardless of the argument."""
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of plain containers and tensors.

    Raises:
        UserError: the file is missing, unreadable, damaged, refers to code, or contains weights only.
    """
    path = Path(path)
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"the checkpoint {path} {found}.{_others(path)}")
    try:
        checkpoint = epoch_checkpoint(load_pickled(path, map_location))
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error.strerror}). Change its permissions") from error
    except DAMAGE as error:
        raise UserError(
            f"the checkpoint {path} is damaged or truncated ({reason_of(error)}).{_others(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} contains weights only; cannot resume training from it. To start from the weights, set "
            "model.params.ckpt_path; to continue a run, name its last.ckpt"
        )
    # Published files often contain the weights only; Lightning requires these three keys.
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__, **checkpoint}


def _others(path: Path) -> str:
    """Return a sentence with the command that continues from the newest other checkpoint of the folder."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist"
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.is_file()]
    if not others:
        return f" {path.parent} contains no other checkpoint. Restore a copy, or start the run again without -r"
    newest = max(others, key=lambda other: other.stat().st_mtime)
    more = f" (or from one of {len(others) - 1} others there)" if others[1:] else ""
    return f" Continue from the one before it{more}: python main.py -r {shlex.quote(str(newest))} -t"


def _explain_write_error(error: Exception, path: Path) -> Exception:
    """Return a ``UserError`` with the next step for a failed write; other errors are returned unchanged."""
    kept = f"{path} is intact" if path.exists() else "no partial file was left"
    last, run = path.with_name("last.ckpt"), path.parent.parent
    if path != last and last.exists():
        kept += f"; {last.name} is intact"
    text = str(error)
    if is_full(error):
        then = "or start again with -l on another disk"
        if last.exists():
            then = f"then continue with: python main.py -r {run} -t (or with a copy of it on another disk)"
        if isinstance(error, OSError):
            error.filename = str(path)
        return UserError(full_message(error, [path.parent], then, f"{path.name} was not saved; {kept}"))
    if isinstance(error, OSError):
        return UserError(f"the checkpoint {path} cannot be written ({error}); {kept}")
    if "PytorchStreamWriter" in text or "write" in text:
        return UserError(f"the checkpoint {path} could not be written ({reason_of(error)}); {kept}")
    return error
