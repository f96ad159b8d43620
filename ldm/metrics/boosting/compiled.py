"""Compilation of the inner loops of the metrics with numba."""

from __future__ import annotations

from collections.abc import Callable

import numba


def compiled() -> Callable[[Callable], Callable]:
    """Return a decorator that compiles a function on its first call; it then runs without the interpreter lock.

    The machine code is cached beside the source or in the home folder; if neither can be written, every process
    compiles it. numba compiles again only when the function's *own* file has changed: functions that call each other,
    and the named tuples that they take, belong in one file.

    Sums are never reordered: machine code that is compiled and machine code that is read from the cache may differ in
    the order, and scores would differ in their last digits.
    """

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the machine code
            return numba.njit(**options)(function)

    return decorate
