"""Compiled functions work where their machine code cannot be kept."""

from __future__ import annotations

import numba
import pytest

from ldm.metrics.boosting.compiled import compiled


@pytest.fixture
def no_folder(monkeypatch):
    """numba as it behaves in a read-only installation of a user without a home folder."""
    real = numba.njit

    def refuse_to_cache(*args, **options):
        if not options.pop("cache", False):
            return real(*args, **options)

        def decorate(function):
            raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available")

        return decorate

    monkeypatch.setattr(numba, "njit", refuse_to_cache)


def test_no_folder_for_machine_code(no_folder):
    @compiled()
    def half(number):
        return number / 2

    assert half(3.0) == 1.5


def test_division_by_zero_follows_numpy():
    @compiled()
    def invert(number):
        return 1.0 / number

    assert invert(0.0) == float("inf")
