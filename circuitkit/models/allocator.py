"""Memory that a pass on the CPU frees is kept for the next one.

By default glibc gives large blocks back to the system when they are freed, and the next pass waits for the system to clear new ones: on
small models that takes a third of the time (scripts/bench/run.py packing). PyTorch has no pool of its own on the CPU.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)
_KEPT = 1 << 29  # bytes at most that stay with the process
_LARGEST = 1 << 25  # larger blocks go back to the system as before; glibc takes no more


@cache
def keep_freed_memory() -> bool:
    """Asks glibc to keep up to 512 MiB of freed memory in this process. Says whether it does.

    Leaves everything as it is where the C library is another one, or where the user has set MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_
    or another allocator by LD_PRELOAD.
    """
    if any(os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD", "GLIBC_TUNABLES")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
