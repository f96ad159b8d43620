"""Learning-rate multipliers for ``torch.optim.lr_scheduler.LambdaLR``, with LDM's names and parameters.

Each is a callable from the optimizer step to the factor of the learning rate; ``with_schedule`` applies it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.util import ConfigError, instantiate_from_config


def with_schedule(optimizers: list[Optimizer], config: Mapping[str, Any] | None) -> Any:
    """Return what ``configure_optimizers`` returns for optimizers and a ``scheduler_config``, None for none."""
    if config is None:
        return optimizers[0] if len(optimizers) == 1 else (optimizers, [])
    factor = instantiate_from_config(config, "callable")
    return optimizers, [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"} for optimizer in optimizers]


class _CyclicScheduler:
    """Cycles of warm-up and decay, with one entry per cycle in each list.

    Args:
        warm_up_steps, cycle_lengths: numbers of optimizer steps.
        f_min, f_max, f_start: factors.
        verbosity_interval: accepted from old configs and ignored; loggers record the learning rate.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lengths = {len(values) for values in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(lengths) != 1:
            raise ConfigError(
                "scheduler_config: expected lists of one length for warm_up_steps, f_min, f_max, f_start and "
                f"cycle_lengths, got lengths {sorted(lengths)}. Give one entry per cycle."
            )
        self.warm_up_steps, self.f_min, self.f_max, self.f_start = warm_up_steps, f_min, f_max, f_start
        self.cycle_lengths, self.cycle_ends = cycle_lengths, list(itertools.accumulate(cycle_lengths))
        self.verbosity_interval = verbosity_interval

    def __call__(self, step: int) -> float:
        """Return the factor at optimizer step ``step``; after the last cycle, its final value."""
        cycle = next((i for i, end in enumerate(self.cycle_ends) if step <= end), len(self.cycle_ends) - 1)
        start = self.cycle_ends[cycle] - self.cycle_lengths[cycle]
        position = min(step - start, self.cycle_lengths[cycle])
        warm_up = self.warm_up_steps[cycle]
        if position < warm_up:
            return (self.f_max[cycle] - self.f_start[cycle]) / warm_up * position + self.f_start[cycle]
        return self.decay(cycle, position)

    def decay(self, cycle: int, position: int) -> float:
        """Return the factor ``position`` steps into ``cycle``, after the warm-up."""
        raise NotImplementedError


class LambdaLinearScheduler(_CyclicScheduler):
    """Linear warm-up, then linear decay from f_max to f_min that is measured from the start of the cycle, as in LDM."""

    def decay(self, cycle: int, position: int) -> float:
        """Return f_min + (f_max - f_min) (length - n) / length."""
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - position) / length


class LambdaWarmUpCosineScheduler2(_CyclicScheduler):
    """Linear warm-up, then a cosine decay from f_max to f_min, in cycles."""

    def decay(self, cycle: int, position: int) -> float:
        """Return f_min + (f_max - f_min) (1 + cos(pi progress)) / 2."""
        warm_up = self.warm_up_steps[cycle]
        progress = min((position - warm_up) / (self.cycle_lengths[cycle] - warm_up), 1.0)
        return self.f_min[cycle] + 0.5 * (self.f_max[cycle] - self.f_min[cycle]) * (1 + math.cos(progress * math.pi))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from ``lr_start`` to ``lr_max``, then a cosine decay to ``lr_min`` at step ``max_decay_steps``.

    Its attributes are part of checkpoints, and therefore those of LDM.
    """

    def __init__(
        self,
        warm_up_steps: float,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: float,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max
        self.verbosity_interval = verbosity_interval

    def __call__(self, step: int) -> float:
        """Return the factor at optimizer step ``step``."""
        if step < self.warm_up_steps:
            return (self.lr_max - self.lr_start) / self.warm_up_steps * step + self.lr_start
        progress = min((step - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps), 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(progress * math.pi))
