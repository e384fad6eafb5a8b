"""Measures this machine: memory that is truly there, cores that truly help, the accelerators, the disk.

PyTorch is asked about accelerators and timed only if it is installed, and is imported by the call, not by
this module. Importing it is what takes the time: see docs/DEVICE_LIFE.md.
"""

from __future__ import annotations

import importlib.util
import math
import platform
from pathlib import Path

import psutil

from edge_sdk.core.profile import Accelerator, DeviceProfile, GemmDtype
from edge_sdk.machine.cgroups import GroupLimits, read_limits
from edge_sdk.machine.processor import cpu_features, cpu_name


def probe(quick: bool = False, folder: Path | None = None) -> DeviceProfile:
    """Measure the machine.

    Args:
        quick: leave out the timing of the matrix product (0.35 s) and, where there are several accelerators,
            the free memory of all but the first.
        folder: where the free disk counts; it need not exist yet. Default: the user's home.
    """
    limits = read_limits()
    memory = psutil.virtual_memory()
    cores = _usable_cores()
    threads = useful_threads(cores, psutil.cpu_count(logical=False), limits.cpus)
    accelerators, gemm_dtype, gflops = _torch(quick, threads)
    swap_total, swap_free = _swap(limits)
    on_battery, battery_percent = _battery()
    return DeviceProfile(
        name=_clean(platform.node()) or "this machine",
        system=platform.system() or "unknown",
        machine=platform.machine() or "unknown",
        cpu=_clean(cpu_name()),
        cores=cores,
        threads=threads,
        memory_total_bytes=_least(memory.total, limits.memory_bytes),
        cpu_features=cpu_features(),
        memory_available_bytes=_least(memory.available, limits.memory_free_bytes),
        swap_total_bytes=swap_total,
        swap_free_bytes=swap_free,
        disk_free_bytes=disk_free_bytes(folder or Path.home()),
        on_battery=on_battery,
        battery_percent=battery_percent,
        gemm_dtype=gemm_dtype,
        gflops=gflops,
        accelerators=accelerators,
    )


def useful_threads(cores: int, physical: int | None, quota: float | None) -> int:
    """Compute threads that pay: one for each physical core that the process may use, within the quota.

    Two threads of one core share its arithmetic units, and threads beyond a quota are stopped in the middle
    of their work while the others wait for them.
    """
    threads = min(cores, physical or cores)
    return max(1, threads if quota is None else min(threads, math.floor(quota)))


def disk_free_bytes(folder: Path) -> int:
    """Free bytes of the disk where `folder` is, or will be made."""
    return psutil.disk_usage(str(existing(folder))).free


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    absolute = folder.expanduser().absolute()
    return next(path for path in (absolute, *absolute.parents) if path.is_dir())


def _torch(quick: bool, threads: int) -> tuple[tuple[Accelerator, ...], GemmDtype | None, float | None]:
    """Of torch: the accelerators, the dtype that training will use, and how fast a product is in it."""
    if importlib.util.find_spec("torch") is None:
        return (), None, None
    from edge_sdk.machine import torch_device

    place = torch_device.torch_device()
    gflops = None if quick else torch_device.measure_gflops(place, threads)
    return torch_device.accelerators(all_free=not quick), torch_device.dtype_name(place), gflops


def _usable_cores() -> int:
    """Logical CPUs that the process may run on; macOS has no affinity to ask for."""
    process = psutil.Process()
    affinity = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else 0
    return affinity or psutil.cpu_count() or 1


def _swap(limits: GroupLimits) -> tuple[int, int]:
    """(total, free) bytes of swap that this process may use."""
    swap = psutil.swap_memory()
    return _least(swap.total, limits.swap_bytes), _least(swap.free, limits.swap_free_bytes)


def _battery() -> tuple[bool | None, float | None]:
    """(on battery power, charge in percent); None without a battery, or where the system does not tell."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return None, None
    plugged: bool | None = battery.power_plugged
    return None if plugged is None else not plugged, min(100.0, max(0.0, float(battery.percent)))


def _least(measured: int, limit: int | None) -> int:
    """The smaller of what the machine has and what the process may have."""
    return measured if limit is None else min(measured, limit)


def _clean(text: str) -> str:
    """Text that UTF-8 can carry: bytes that were not UTF-8 became lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
