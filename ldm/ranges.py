"""Ranges of numbers, as names for annotations of arguments that configs set.

``def __init__(self, batch_size: PositiveInt, ema_decay: Fraction = 0.9999)``: the check of configs refuses other values
with the dotted key, and the JSON Schema of configs contains the limits. For type checkers they are ``int`` and
``float``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

PositiveInt = NonNegativeInt = Size = Count = OptionalCount = Seed = NumSteps = int
PositiveFloat = NonNegativeFloat = Fraction = PositiveFraction = Share = Weight = Finite = LearningRate = Steps = float
Eta = float
Spacing = SamplerName = ConditioningKey = str
# Names of texts -> entries of their ``Literal``
CHOICES = {"Spacing": "'uniform', 'quad'", "SamplerName": "'ddim', 'ddpm', 'plms', 'dpm_solver'"}
CHOICES["ConditioningKey"] = "'concat', 'crossattn', 'hybrid', 'adm', 'hybrid-adm', 'crossattn-adm'"


class Range(NamedTuple):
    """Limits of a number, both included unless ``above`` is given."""

    kind: type
    text: str  # what an error message expects
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # excluded lower limit
    is_whole: bool = False

    def contains(self, value: Any) -> bool:
        """Return whether a value is a number within the limits; true and false are not numbers."""
        if isinstance(value, bool) or not isinstance(value, SupportsIndex if self.kind is int else SupportsFloat):
            return False
        is_within = self.least <= float(value) <= self.most and float(value) > self.above
        return is_within and not (self.is_whole and float(value) % 1)


RANGES = {
    "PositiveInt": Range(int, "an integer of at least 1", least=1),
    "NonNegativeInt": Range(int, "an integer of at least 0", least=0),
    "Size": Range(int, "an integer from 1 to 65536", least=1, most=65536),
    "Count": Range(int, "an integer from 1 to 1000000", least=1, most=10**6),  # of items in memory
    "OptionalCount": Range(int, "an integer from 0 to 1000000", least=0, most=10**6),
    "NumSteps": Range(int, "an integer from 1 to 1000000", least=1, most=10**6),
    "Seed": Range(int, "an integer from 0 to 4294967295", least=0, most=2**32 - 1),
    "Steps": Range(float, "an integer of at least 1", least=1, is_whole=True),  # 1e5 is a float in YAML
    "Eta": Range(float, "a number from 0 (deterministic) to 1 (as DDPM)", least=0.0, most=1.4143),  # at most sqrt(2)
    "PositiveFloat": Range(float, "a number above 0", above=0.0),
    "LearningRate": Range(float, "a number above 0 and at most 10", above=0.0, most=10.0),
    "Weight": Range(float, "a number from 0 to 1000000", least=0.0, most=1e6),
    "Finite": Range(float, "a number from -1000000 to 1000000", least=-1e6, most=1e6),
    "NonNegativeFloat": Range(float, "a number of at least 0", least=0.0),
    "Fraction": Range(float, "a number from 0 to 1", least=0.0, most=1.0),
    "PositiveFraction": Range(float, "a number above 0 and at most 1", above=0.0, most=1.0),
    "Share": Range(float, "a number of at least 0 and below 1", least=0.0, most=1 - 2**-53),
}
