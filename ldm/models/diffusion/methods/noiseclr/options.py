"""Options of NoiseCLR that the check of a config reads without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ldm.data.options import require_count
from ldm.ranges import Count, OptionalCount, PositiveFloat, Share, Weight
from ldm.util import ConfigError


@dataclass(frozen=True)
class ContrastOptions:
    """Numeric options of ``NoiseCLR``, which describes them."""

    num_directions: Count = 100
    directions_per_iteration: Count = 20
    temperature: PositiveFloat = 0.5
    min_timestep: OptionalCount = 0
    max_timestep: OptionalCount | None = None
    weight_decay: Weight = 1e-2
    betas: Sequence[Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    def __post_init__(self) -> None:
        where, most = "model.params", self.num_directions - 1
        require_count(f"{where}.num_directions", self.num_directions, least=2)
        if not 1 <= self.directions_per_iteration <= most:
            raise ConfigError(
                f"{where}.directions_per_iteration: expected 1 to {most} (num_directions - 1), got "
                f"{self.directions_per_iteration}. Compare fewer directions, or learn more"
            )
        for name in ("temperature", "eps"):
            if not 0 < vars(self)[name] < math.inf:
                raise ConfigError(f"{where}.{name}: expected a positive number, got {vars(self)[name]}")
        if not 0 <= self.min_timestep < (math.inf if self.max_timestep is None else self.max_timestep):
            found = [self.min_timestep, self.max_timestep]
            raise ConfigError(f"{where}.min_timestep, max_timestep: expected 0 <= min < max, got {found}")
        if len(self.betas) != 2:
            raise ConfigError(f"{where}.betas: expected two numbers from 0 to below 1, got {list(self.betas)}")


def _check(params: Mapping[str, Any]) -> None:
    ContrastOptions(**{field.name: params[field.name] for field in fields(ContrastOptions) if field.name in params})


CHECKS = {"NoiseCLR": _check}  # class beside this file -> check of its params
