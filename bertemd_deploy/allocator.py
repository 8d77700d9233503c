"""What glibc does with memory that a training step frees: it is kept for the next step, not handed back and asked for again.

Gradients, the table of words' above all, and activations are large; by default each is mapped anew at every step, and the
kernel clears every page of it before its first use. The peak stays about what it was; between steps the process keeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
_USUAL = ((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26))  # where its own adjustment ends
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process while this lasts, and hand it back after; the first to end ends it for all.

    Does nothing without glibc, or where the environment says what glibc is to do.
    """
    left_alone = sys.platform != "linux" or any(name in os.environ for name in _CHOSEN)
    libc: Any = None if left_alone else ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        for option, value in _USUAL:
            libc.mallopt(option, value)
        libc.malloc_trim(0)
