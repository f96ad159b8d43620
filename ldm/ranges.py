"""Ranges of numbers, as names for annotations of arguments that configs set.

``def __init__(self, batch_size: PositiveInt, ema_decay: Fraction = 0.9999)``: the check of configs refuses other values
with the dotted key, and the JSON Schema of configs contains the limits. For type checkers they are ``int`` and
``float``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

PositiveInt = NonNegativeInt = Size = int
PositiveFloat = NonNegativeFloat = Fraction = float


class Range(NamedTuple):
    """Limits of a number, both included unless ``above`` is given."""

    kind: type
    text: str  # what an error message expects
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # excluded lower limit

    def contains(self, value: Any) -> bool:
        """Return whether a value is a number within the limits; true and false are not numbers."""
        if isinstance(value, bool) or not isinstance(value, SupportsIndex if self.kind is int else SupportsFloat):
            return False
        return self.least <= float(value) <= self.most and float(value) > self.above


RANGES = {
    "PositiveInt": Range(int, "an integer of at least 1", least=1),
    "NonNegativeInt": Range(int, "an integer of at least 0", least=0),
    "Size": Range(int, "an integer from 1 to 65536", least=1, most=65536),
    "PositiveFloat": Range(float, "a number above 0", above=0.0),
    "NonNegativeFloat": Range(float, "a number of at least 0", least=0.0),
    "Fraction": Range(float, "a number from 0 to 1", least=0.0, most=1.0),
}
