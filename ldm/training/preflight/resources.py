"""Memory, disk space and the length of epochs, compared with what a run needs."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

_ADAM_STATES = 2  # tensors per trained parameter
_GIB = 2**30


def check_epoch(trainer: pl.Trainer, num_batches: int) -> None:
    """Raise a ``ConfigError`` if the first validation within an epoch comes after its end."""
    interval = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > num_batches:
        raise ConfigError(
            f"lightning.trainer.val_check_interval: expected at most {num_batches}, the batches of an epoch, got "
            f"{interval}. Lower it, or set check_val_every_n_epoch: null to count batches over all epochs"
        )


def check_memory(trainer: pl.Trainer, model: pl.LightningModule, activation_bytes: int | None) -> None:
    """Log an estimate of the memory of training.

    Raises:
        UserError: weights, gradients and the states of Adam exceed the memory of the only device, for a model of
            this package; other code may have another optimizer.
    """
    weights = _num_bytes(model.parameters()) + _num_bytes(model.buffers())
    trained = _num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    least, available = weights + (1 + _ADAM_STATES) * trained, _memory(trainer.strategy.root_device)
    shown = f"{least / _GIB:.3g} GiB for weights, gradients and optimizer"
    if activation_bytes:
        shown += f", about {activation_bytes / _GIB:.3g} GiB for activations"
    logger.info("memory: %s%s", shown, f", of {available / _GIB:.1f} GiB" if available else "")
    is_certain = trainer.world_size == 1 and type(model).__module__.startswith("ldm.")
    if is_certain and available and least > available:
        raise UserError(
            f"memory: expected at most {available / _GIB:.1f} GiB, the memory of {trainer.strategy.root_device}, got "
            f"{shown}. Use a smaller model or another device"
        )


def warn_of_full_disk(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Log a warning if the checkpoints that a run keeps may not fit on the disk."""
    trained = _num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    stored = _num_bytes(model.state_dict().values()) + _ADAM_STATES * trained
    counts = [callback.save_top_k for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    kept = 2 + sum(max(1, count) for count in counts)  # last.ckpt, and its replacement while that is written
    folder = Path(trainer.default_root_dir).absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if counts and kept * stored > free:
        logger.warning(
            "%s: %.0f MB are free, but %d checkpoints of %.1f MB are kept. Free some space, choose another folder "
            "with -l, or lower lightning.modelcheckpoint.params.save_top_k",
            folder,
            free / 1e6,
            kept,
            stored / 1e6,
        )


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _memory(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, ``None`` if it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
