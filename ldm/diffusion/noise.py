"""Random numbers that repeat, so that samples differ by their conditions alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def kept_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context after which torch's random states of the CPU and of ``device`` are restored."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def fixed_noise(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of ``device`` within the context; their states are restored after it."""
    with kept_random_state(device):
        torch.manual_seed(seed)
        yield


def seeded_noise(count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Return standard normal noise (count, *shape), drawn on the CPU: the same for every device."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
