"""Checkpoints ``<epoch>.pth`` of the CLIP-guided DDPM's reference code, in Lightning's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "model.diffusion_model."
_LIGHTNING = "1.4.2"  # a version whose checkpoints have an epoch and no progress; Lightning completes them


def epoch_checkpoint(content: Any) -> Any:
    """Return ``{model, optimizer, epoch, ...}`` as a Lightning checkpoint; other contents unchanged.

    The number of steps is that of the optimizer's state, and the epoch of the file counts from 0 and is complete.
    """
    if not isinstance(content, Mapping) or not {"model", "optimizer", "epoch"} <= set(content):
        return content
    optimizer = content["optimizer"]
    steps = max((int(state["step"]) for state in optimizer["state"].values()), default=0)
    return {
        "pytorch-lightning_version": _LIGHTNING,
        "state_dict": {PREFIX + key: value for key, value in content["model"].items()},
        "optimizer_states": [optimizer],
        "lr_schedulers": [],
        "epoch": int(content["epoch"]) + 1,
        "global_step": steps,
    }
