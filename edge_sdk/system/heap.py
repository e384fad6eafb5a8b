"""The C library's heap, given back to the system. Imports nothing but the standard library."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim_heap() -> None:
    """Give back the pages of freed memory that glibc would keep for later; elsewhere nothing is done."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """`malloc_trim` of <malloc.h>; None where the C library has none, as musl and macOS."""
    if sys.platform != "linux":
        return None
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # a program that was linked without a dynamic loader; another library
        return None
    return found
