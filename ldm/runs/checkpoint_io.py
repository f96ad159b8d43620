"""Checkpoint files that are whole or absent, and are read as data, never as code."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import CheckpointIO

from ldm.modules.weights import DAMAGE, load_pickled
from ldm.util import UserError, atomic_write

logger = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, renames; reads with ``weights_only=True``."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint; the file that stood there stays whole whatever happens.

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
        """Read one checkpoint; ``weights_only`` is always on, whatever is asked."""
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        """Delete one checkpoint; one that is already gone is fine."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of plain containers and tensors.

    Raises:
        UserError: the file is absent, cut short, names code to run, or holds bare weights.
    """
    if not Path(path).is_file():
        raise UserError(f"the checkpoint {path} does not exist.{_others(Path(path))}")
    try:
        checkpoint = load_pickled(path, map_location)
    except UserError:
        raise
    except DAMAGE as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"the checkpoint {path} is damaged or cut short ({first_line}); delete it.{_others(Path(path))}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{path} is no checkpoint of a run: it holds bare weights. To start from them name the file in "
            "model.params.ckpt_path; to continue a run give its last.ckpt"
        )
    # Published files often keep the weights and nothing of the run; Lightning asks for these three.
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": pl.__version__, **checkpoint}


def _others(path: Path) -> str:
    """Return what else one could continue from."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist"
    others = sorted(str(other) for other in path.parent.glob("*.ckpt") if other != path)
    if not others:
        return f" {path.parent} holds no other checkpoint: start the run again without -r"
    return f" Continue from another one with -r: {', '.join(others[-5:])}"


def _explain_write_error(error: Exception, path: Path) -> Exception:
    """Turn an error of the file system into a message with the next step; other errors pass through."""
    kept = f"{path} is intact as it was" if path.exists() else "no file was left half written"
    last = path.with_name("last.ckpt")
    if path != last and last.exists():
        kept += f"; {last.name} is intact"
    text = str(error)
    # torch reports a file that took fewer bytes than it was given by the name of its own writer alone.
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "inline_container" in text
    if is_full or "No space left" in text:
        return UserError(
            f"no space left on the disk to write {path}; {kept}. Free some space, then continue with: "
            f"python main.py -r {path.parent.parent} -t"
        )
    if isinstance(error, OSError):
        return UserError(f"the checkpoint {path} cannot be written: {error}; {kept}")
    if "PytorchStreamWriter" in text or "write" in text:
        return UserError(f"the checkpoint {path} could not be written ({text.splitlines()[0]}); {kept}")
    return error
