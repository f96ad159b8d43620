"""Compilation of the inner loops of the metrics with numba."""

from __future__ import annotations

from collections.abc import Callable

import numba

REORDERED = {"nnan", "nsz", "reassoc", "contract"}  # floating-point rules under which sums may be vectorised


def compiled(fast: bool = False) -> Callable[[Callable], Callable]:
    """Return a decorator that compiles a function on its first call; it then runs without the interpreter lock.

    The machine code is cached beside the source or in the home folder; if neither can be written, every process
    compiles it. numba compiles again only when the function's *own* file has changed: functions that call each other,
    and the named tuples that they take, belong in one file.

    Args:
        fast: allow reordering of sums (faster, other rounding); NaN must not occur.
    """

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "error_model": "numpy", "fastmath": REORDERED if fast else False}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the machine code
            return numba.njit(**options)(function)

    return decorate
