"""Memory of training steps on CPUs."""

from __future__ import annotations

import ctypes
import os
import sys

# Names and numbers of <malloc.h> of glibc.
_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
_LARGEST = 2**31 - 1  # a C int, in bytes


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of this process instead of returning it to the system.

    Every training step allocates and frees tensors of the same sizes. By default glibc returns large ones at once, and
    the next step waits for the system to clear new pages. Peak memory increases by a few percent.

    Returns:
        Whether the allocator was set. It is left alone where the user has set it (``MALLOC_TRIM_THRESHOLD_``,
        ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) and where the C library is another one.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in (*_OPTIONS, "GLIBC_TUNABLES")):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(set_option(number, _LARGEST) == 1 for number in _OPTIONS.values())
