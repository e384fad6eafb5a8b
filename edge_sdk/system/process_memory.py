"""How much memory this process holds, and held at most, by the operating system's own count."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, shared libraries included."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that was in RAM since `reset_peak`, or since the start where it cannot be reset.

    Linux: VmHWM. Windows: the peak working set. macOS: `ru_maxrss`, which counts bytes there.
    """
    if sys.platform == "linux":
        lines = (line.split() for line in STATUS.read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]), 0)
    elif sys.platform == "win32":  # noqa: RET505  mypy tells platforms apart by branches
        return int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Begin a new peak at what is resident now. False where that cannot be done: all but Linux."""
    if sys.platform != "linux":
        return False
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # a container may forbid it
        return False
    return True
