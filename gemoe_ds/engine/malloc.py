"""Host memory: what a training step frees stays with the process, what oneDNN keeps is bounded."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
MOST_KERNELS = 256  # more than ragged products have lengths in use: see moe/experts/by_expert.py


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks instead of giving them back; False where there is no glibc.

    A step on a CPU frees and asks for the same large arrays again and again. By default glibc
    maps each one above 32 MB anew, and the kernel clears its pages one by one when they are first
    touched: 31 ms for the 134 MB of one layer's projections (OLMoE, 4096 tokens), against 4 ms.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def bound_kernel_caches(onednn: int = MOST_KERNELS, torch: int = 1) -> None:
    """Before the first product: keep so many kernels, unless the environment says how many.

    oneDNN makes a kernel of 0.6 to 3 MB for every shape of a bfloat16 product, and keeps 1,024 of
    them; PyTorch keeps as many again. Experts meet new numbers of rows in every step, so that a
    process would grow by gigabytes. PyTorch's cache must have a place (0 ends in a fault).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(onednn))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(torch))


def give_back_freed_memory() -> None:
    """All of it, once: what has looked at a model before it trains leaves holes in the heap."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
