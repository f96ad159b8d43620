"""Contexts in which a model is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ldm.diffusion.noise import kept_random_state
from ldm.models.contracts import HasAverage
from ldm.util import UserError


def averaged(model: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context that uses the averaged weights of a model; the trained ones if there is no average."""
    return model.ema_scope() if isinstance(model, HasAverage) else contextlib.nullcontext()


def chosen_device(name: str | None = None) -> torch.device:
    """Return a device by name; without a name the GPU if there is one, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"--device: expected a device of this machine, got {name!r} ({cause}). Try cpu") from error
    return device


@contextlib.contextmanager
def evaluating(module: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Put a module in evaluation mode; restore its mode and torch's random states afterwards."""
    was_training = module.training
    with kept_random_state(torch.device(device)):
        module.eval()
        try:
            yield
        finally:
            module.train(was_training)
