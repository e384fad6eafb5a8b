"""Measures this machine: memory that is truly there, cores that truly help, the accelerator, the disk.

Inside a container the kernel reports the whole machine; the limits that count are in the control groups
(v1 or v2) above the process, and the tightest one holds. PyTorch is asked about the accelerator only if it
is installed, and is imported by the call, not by this module.
"""

from __future__ import annotations

import importlib.util
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from edge_sdk.core.profile import Accelerator, DeviceProfile

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")  # boards whose cpuinfo names no model, as the Raspberry Pi

GEMM_SIZE = 512
GEMM_S = 0.2


@dataclass(frozen=True)
class GroupLimits:
    """The tightest limits over all control groups above a process; None where there is none."""

    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpus: float | None = None


def probe(quick: bool = False) -> DeviceProfile:
    """Measure the machine. `quick` leaves out the matrix product (0.3 s) and with it `gflops`."""
    memory = psutil.virtual_memory()
    limits = read_limits(CGROUPS, MEMBERSHIP)
    cores = _usable_cores()
    return DeviceProfile(
        name=_clean(platform.node()) or "this machine",
        system=platform.system() or "unknown",
        machine=platform.machine() or "unknown",
        cpu=cpu_name(CPUINFO, BOARD),
        cores=cores,
        threads=useful_threads(cores, psutil.cpu_count(logical=False), limits.cpus),
        memory_total_bytes=_least(memory.total, limits.memory_bytes),
        memory_available_bytes=_least(memory.available, limits.memory_free_bytes),
        accelerator=_accelerator(),
        disk_free_bytes=psutil.disk_usage(str(Path.cwd())).free,
        on_battery=_on_battery(),
        gflops=None if quick else measure_gflops(),
    )


# --- control groups ------------------------------------------------------------------------------


def read_limits(root: Path, membership: Path) -> GroupLimits:
    """Limits of the process whose `/proc/<pid>/cgroup` is `membership`, of v1, v2 or both.

    Memory is free where it is unused or holds file pages that the kernel gives up under pressure.
    """
    if not membership.is_file():
        return GroupLimits()  # not Linux, or no control groups
    totals: list[int] = []
    frees: list[int] = []
    cpus: list[float] = []
    for version, controllers, folder in _groups(root, membership.read_text(encoding="utf-8")):
        if version == 2 or "memory" in controllers:
            limit = _memory_limit(folder, version)
            if limit is not None:
                totals.append(limit)
                frees.append(max(0, limit - _memory_held(folder, version)))
        if version == 2 or "cpu" in controllers:
            quota = _cpu_quota(folder, version)
            if quota is not None:
                cpus.append(quota)
    return GroupLimits(min(totals, default=None), min(frees, default=None), min(cpus, default=None))


def _groups(root: Path, membership: str) -> Iterator[tuple[int, list[str], Path]]:
    """(version, controllers, folder) of each group from the process's own up to the root of its hierarchy.

    A container often sees its own group mounted as the root while the membership still names the path
    outside; folders that are not there are passed over, the root remains.
    """
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        controllers = names.split(",") if names else []
        version = 1 if names else 2
        # A v1 hierarchy is mounted under its controllers' joint name, with links for the single ones.
        mounts = [root / names, *(root / name for name in controllers)] if names else [root, root / "unified"]
        mount = next((folder for folder in mounts if folder.is_dir()), None)
        if mount is None:
            continue
        relative = Path(path.lstrip("/"))
        for level in [relative, *relative.parents]:
            if ".." not in level.parts and (mount / level).is_dir():
                yield version, controllers, mount / level


def _memory_limit(folder: Path, version: int) -> int | None:
    """The group's memory limit; v1 writes "none" as a number near 2^63."""
    value = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    return None if value is None or value >= 1 << 60 else value


def _memory_held(folder: Path, version: int) -> int:
    """Memory of the group that cannot be had without harm: what it uses but for inactive file pages."""
    used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    key = "inactive_file" if version == 2 else "total_inactive_file"
    stat = folder / "memory.stat"
    for line in stat.read_text(encoding="utf-8").splitlines() if stat.is_file() else []:
        if line.startswith(key + " "):
            return max(0, used - int(line.split()[1]))
    return used


def _cpu_quota(folder: Path, version: int) -> float | None:
    """CPUs' worth of time that the group may use."""
    if version == 2:
        file = folder / "cpu.max"
        parts = file.read_text(encoding="utf-8").split() if file.is_file() else []
        return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0] != "max" else None
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _number(file: Path) -> int | None:
    """The integer in a file; None where there is no file or it says `max`."""
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
    return None if text == "max" else int(text)


# --- the rest ------------------------------------------------------------------------------------


def useful_threads(cores: int, physical: int | None, quota: float | None) -> int:
    """Compute threads that pay: one for each physical core that the process may use, within the quota.

    Two threads of one core share its arithmetic units, and threads beyond a quota are stopped in the middle
    of their work while the others wait for them.
    """
    threads = min(cores, physical or cores)
    return max(1, threads if quota is None else min(threads, math.floor(quota)))


def cpu_name(cpuinfo: Path, board: Path) -> str:
    """The processor's name as Linux tells it, or as Python does elsewhere."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return _clean(value.strip())
    if board.is_file():
        return _clean(board.read_text(encoding="utf-8", errors="replace").rstrip("\0\n"))
    return _clean(platform.processor()) or platform.machine() or "unknown"


def measure_gflops() -> float:
    """Billions of floating-point operations a second in numpy's float32 matrix product: the best of 0.2 s."""
    a = np.ones((GEMM_SIZE, GEMM_SIZE), dtype=np.float32)
    out = a @ a  # the first product starts the threads
    best_s, until = math.inf, time.perf_counter() + GEMM_S
    while (began := time.perf_counter()) < until:
        np.matmul(a, a, out=out)
        best_s = min(best_s, time.perf_counter() - began)
    return round(2 * GEMM_SIZE**3 / best_s / 1e9, 1)


def _accelerator() -> Accelerator | None:
    """The GPU that PyTorch would train on, if PyTorch is installed and sees one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        shared = bool(getattr(properties, "is_integrated", False))
        return Accelerator("cuda", _clean(properties.name), total, free, shared)
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = max(0, total - torch.mps.driver_allocated_memory())
        return Accelerator("mps", "Apple GPU", total, free, shared=True)
    if torch.xpu.is_available():
        free, total = torch.xpu.mem_get_info(0)
        return Accelerator("xpu", _clean(torch.xpu.get_device_name(0)), total, free)
    return None


def _usable_cores() -> int:
    """Logical CPUs that the process may run on; macOS has no affinity to ask for."""
    process = psutil.Process()
    affinity = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else 0
    return affinity or psutil.cpu_count() or 1


def _on_battery() -> bool | None:
    """True on battery power; None without a battery, or where the system does not tell."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def _least(measured: int, limit: int | None) -> int:
    """The smaller of what the machine has and what the process may have."""
    return measured if limit is None else min(measured, limit)


def _clean(text: str) -> str:
    """Text that UTF-8 can carry: bytes that were not UTF-8 became lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
