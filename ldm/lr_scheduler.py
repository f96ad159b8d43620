"""Learning-rate multipliers for ``torch.optim.lr_scheduler.LambdaLR``, with LDM's names and parameters.

Each is a callable from the optimizer step to the factor of the learning rate; ``with_schedule`` applies it. A warm-up
that lasts as long as its schedule, or longer, is cut off by the end of the schedule. The check of configs builds these
callables; torch is therefore imported only where a schedule is applied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.ranges import NonNegativeFloat, PositiveFloat, Weight
from ldm.util import ConfigError, instantiate_from_config

if TYPE_CHECKING:
    from torch.optim import Optimizer


_ENDLESS = 10**15  # steps of a cycle without end, for which infinity has no arithmetic


def with_schedule(optimizers: list[Optimizer], config: Mapping[str, Any] | None) -> Any:
    """Return what ``configure_optimizers`` returns for optimizers and a ``scheduler_config``, None for none."""
    if config is None:
        return optimizers[0] if len(optimizers) == 1 else (optimizers, [])
    from torch.optim.lr_scheduler import LambdaLR

    factor = instantiate_from_config(config, "callable")
    return optimizers, [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"} for optimizer in optimizers]


def _progress(steps: float, duration: float) -> float:
    """Return the part of a decay that is done, in [0, 1]; a decay without duration is done after its first step."""
    return min(steps / duration, 1.0) if duration > 0 else float(steps > 0)


class _CyclicScheduler:
    """Cycles of warm-up and decay, with one entry per cycle in each list.

    Args:
        warm_up_steps, cycle_lengths: numbers of optimizer steps.
        f_min, f_max, f_start: factors.
        verbosity_interval: accepted from old configs and ignored; loggers record the learning rate.

    Raises:
        ConfigError: the lists differ in length.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[NonNegativeFloat],
        f_min: Sequence[Weight],
        f_max: Sequence[Weight],
        f_start: Sequence[Weight],
        cycle_lengths: Sequence[PositiveFloat],
        verbosity_interval: int = 0,
    ) -> None:
        cycles = max(1, len(cycle_lengths))
        lists = {"warm_up_steps": warm_up_steps, "f_min": f_min, "f_max": f_max, "f_start": f_start}
        for name, values in {"cycle_lengths": cycle_lengths, **lists}.items():
            if len(values) != cycles:
                expected = f"lists of one length for all cycles, here {cycles} as in cycle_lengths"
                raise ConfigError(f"{name}: expected {expected}, got {values!r}. Give one entry per cycle")
        self.warm_up_steps, self.f_min, self.f_max, self.f_start = warm_up_steps, f_min, f_max, f_start
        self.cycle_lengths = [min(length, _ENDLESS) for length in cycle_lengths]
        self.cycle_ends = list(itertools.accumulate(self.cycle_lengths))
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
        progress = _progress(position - warm_up, self.cycle_lengths[cycle] - warm_up)
        return self.f_min[cycle] + 0.5 * (self.f_max[cycle] - self.f_min[cycle]) * (1 + math.cos(progress * math.pi))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from ``lr_start`` to ``lr_max``, then a cosine decay to ``lr_min`` at step ``max_decay_steps``.

    Its attributes are part of checkpoints, and therefore those of LDM.
    """

    def __init__(
        self,
        warm_up_steps: NonNegativeFloat,
        lr_min: NonNegativeFloat,
        lr_max: NonNegativeFloat,
        lr_start: NonNegativeFloat,
        max_decay_steps: PositiveFloat,
        verbosity_interval: int = 0,
    ) -> None:
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max
        self.verbosity_interval = verbosity_interval

    def __call__(self, step: int) -> float:
        """Return the factor at optimizer step ``step``."""
        if step < self.warm_up_steps:
            return (self.lr_max - self.lr_start) / self.warm_up_steps * step + self.lr_start
        progress = _progress(step - self.warm_up_steps, self.max_decay_steps - self.warm_up_steps)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(progress * math.pi))


FACTORS = (_CyclicScheduler, LambdaWarmUpCosineScheduler)  # classes of the functions of this module
