"""What this process holds, how high it went, and what the frameworks alone take."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def give_back() -> None:
    """Collect garbage and hand free heap back to the system. Only glibc needs to be asked."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent from musl
        if trim is not None:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_peak(device: torch.device) -> None:
    """Begin a new high-water mark."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # proc(5): resets the peak resident set size


def peak_bytes(device: torch.device) -> int:
    """The high-water mark: reserved on a CUDA device, resident on a CPU.

    Elsewhere than on Linux the resident peak is that of the whole life of the process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def held_bytes() -> int:
    """Resident memory now."""
    return int(psutil.Process().memory_info().rss)


def context_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is in use beside what PyTorch reserved: the context, and other programs."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))
