"""What glibc's allocator does with freed memory: kept for the next step of a training, given back between stages.

Each training step frees some hundred megabytes of activations and wants them again at once. By default glibc hands
them back to the system in between, and the system hands out fresh pages, zeroed one by one: a tenth of a step.
Elsewhere than on glibc there is nothing to do, and nothing is done.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for what may lie free at the heap's end, and from which size on a block is a mapping of its own."""

_LARGEST_IN_HEAP = 32 * 2**20
"""The largest that glibc takes for the second one."""

_DEFAULT_TRIM = 128 * 2**10


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in this process inside; afterwards it goes back to the system."""
    mallopt = _glibc("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM)
        return_memory()


def return_memory() -> None:
    """Give back to the system what an earlier stage of this process has freed, so that stages don't add up."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
