"""What counts as running out of memory, and catching it so that what it held is free again.

The words are those of torch's allocators (CPU, CUDA, HIP, XPU, MPS), bitsandbytes, OpenBLAS, C++, the dynamic
loader and the operating systems; torch reports a failed allocation on a CPU as a plain RuntimeError.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

from edge_sdk.core.errors import EdgeError, OutOfMemory, first_line

WORDS = re.compile(
    r"out of memory|not enough memory|memory allocation still failed|can(no|')t allocate memory"
    r"|failed to allocate|bad[_ ]alloc|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    r"|OUT_OF_(DEVICE|HOST)_MEMORY|os error 12\b",
    re.IGNORECASE,
)


def said(text: str) -> bool:
    """Whether a message speaks of memory that was not to be had."""
    return WORDS.search(text) is not None


def means_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is a failed allocation of somebody else's code, and no error of this project."""
    if isinstance(error, EdgeError):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, Exception) and said(str(error))


def caught(work: Callable[[], None]) -> str | None:
    """Run `work`; None, or in one line what was said when the memory was not enough. Other errors pass.

    When this returns, the exception is gone, and with its traceback all that the failed step had computed.
    """
    try:
        work()
    except Exception as error:
        if not means_out_of_memory(error):
            raise
        return first_line(error)
    return None


def out_of_memory(step: int, setting: str, reason: str) -> OutOfMemory:
    """The error for work that ended after `step` steps at a setting, described in words."""
    text = f"not enough memory after step {step} ({setting}): {reason}"
    return OutOfMemory(text, step=step, setting=setting, reason=reason)
