"""One way to compile the inner loops of the metrics with numba."""

from __future__ import annotations

from collections.abc import Callable

import numba

REORDERED = {"nnan", "nsz", "reassoc", "contract"}  # floating-point rules under which sums may be vectorised


def compiled(fast: bool = False) -> Callable[[Callable], Callable]:
    """Compile a function on its first call; it then runs without the interpreter's lock.

    The machine code is kept beside the source or in the home folder; where neither can be written, every process
    compiles for itself. numba compiles anew when the function's *own* file has changed: functions that call each
    other, and the named tuples they take, belong in one file.

    Args:
        fast: let sums be reordered (faster, other rounding); NaN must not occur.
    """

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "error_model": "numpy", "fastmath": REORDERED if fast else False}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no folder for the machine code
            return numba.njit(**options)(function)

    return decorate
