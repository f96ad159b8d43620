"""Ranges of numbers in configs."""

from __future__ import annotations

import math

import pytest

from ldm.ranges import RANGES
from ldm.util import mismatch


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("PositiveInt", [1, 10**6], [0, -1, 1.5, True, "1", None]),
        ("NonNegativeInt", [0, 3], [-1, False, 0.0]),
        ("Size", [1, 65536], [0, 65537, 1e3]),
        ("PositiveFloat", [1e-30, 3], [0, -1e-3, math.nan, "1e-4", True]),
        ("NonNegativeFloat", [0, 0.5, math.inf], [-1e-9, math.nan]),
        ("Fraction", [0, 1, 0.5], [-0.1, 1.0001, math.nan]),
    ],
)
def test_values(name, inside, outside):
    for value in inside:
        assert mismatch(name, value) == ""
    for value in outside:
        assert mismatch(name, value) == f"expected {RANGES[name].text}, got {value!r}"


def test_unions_with_null_and_plain_numbers():
    assert mismatch("PositiveInt | None", None) == ""
    assert mismatch("PositiveInt | None", 0) == "expected an integer of at least 1 or null, got 0"
    assert mismatch("float", math.nan) == "expected a number, got nan"
    assert mismatch("Any", math.nan) == ""
