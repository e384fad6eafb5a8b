"""How the C library's heap is used while activations are recomputed. Only glibc needs this."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of <malloc.h>

# Blocks from this size on come from the system one by one and go back the moment they are freed.
TIGHT_BYTES = 256 << 10
LOOSE_BYTES = 32 << 20  # the highest that glibc accepts; it gets there by itself in a process that trains


@contextmanager
def tight_heap(on: bool) -> Iterator[None]:
    """Within this context the process holds little more than what is allocated, if `on`.

    Recomputation frees a block's activations and keeps its small input. glibc puts that input into the hole
    that the large tensors left, so that those of the next block find no room there and the heap grows as if
    nothing had been freed: a GPT-2 of 124M parameters on 2 × 512 tokens held 395 MB more than it had
    allocated, all that recomputation should have saved. The price of a tight heap is pages that the kernel
    clears again and again: steps of about 1.6 times the time. It is for those whose memory is short.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on and sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, TIGHT_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LOOSE_BYTES)
