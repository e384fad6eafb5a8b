"""Limits of the Linux control groups (v1 or v2) above this process.

Inside a container the kernel reports the whole machine; the limits that count are in the control groups, and
the tightest one holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class GroupLimits:
    """The tightest limits over all control groups above a process; None where there is none."""

    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpus: float | None = None
    swap_bytes: int | None = None
    swap_free_bytes: int | None = None


def read_limits(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> GroupLimits:
    """Limits of the process whose `/proc/<pid>/cgroup` is `membership`, of v1, v2 or both.

    Memory is free where it is unused or holds file pages that the kernel gives up under pressure.
    """
    if not membership.is_file():
        return GroupLimits()  # not Linux, or no control groups
    memory: list[tuple[int, int]] = []  # (limit, free)
    swap: list[tuple[int, int]] = []
    cpus: list[float] = []
    for version, controllers, folder in _groups(root, membership.read_text(encoding="utf-8")):
        if version == 2 or "memory" in controllers:
            memory += _memory(folder, version)
            swap += _swap(folder, version)
        if version == 2 or "cpu" in controllers:
            cpus += _cpu_quota(folder, version)
    return GroupLimits(
        min((limit for limit, _ in memory), default=None),
        min((free for _, free in memory), default=None),
        min(cpus, default=None),
        min((limit for limit, _ in swap), default=None),
        min((free for _, free in swap), default=None),
    )


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


def _memory(folder: Path, version: int) -> list[tuple[int, int]]:
    """The group's memory limit and what is free of it, if it has one."""
    limit = _limit(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    return [] if limit is None else [(limit, max(0, limit - _memory_held(folder, version)))]


def _memory_held(folder: Path, version: int) -> int:
    """Memory of the group that cannot be had without harm: what it uses but for inactive file pages."""
    used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")) or 0
    key = "inactive_file" if version == 2 else "total_inactive_file"
    stat = folder / "memory.stat"
    for line in stat.read_text(encoding="utf-8").splitlines() if stat.is_file() else []:
        if line.startswith(key + " "):
            return max(0, used - int(line.split()[1]))
    return used


def _swap(folder: Path, version: int) -> list[tuple[int, int]]:
    """The group's swap limit and what is free of it. v1 limits memory and swap together (`memsw`)."""
    if version == 2:
        limit, used = _limit(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
        return [] if limit is None else [(limit, max(0, limit - (used or 0)))]
    both, memory = _limit(folder / "memory.memsw.limit_in_bytes"), _limit(folder / "memory.limit_in_bytes")
    if both is None or memory is None:
        return []
    held = _number(folder / "memory.memsw.usage_in_bytes") or 0
    in_memory = _number(folder / "memory.usage_in_bytes") or 0
    limit = max(0, both - memory)
    return [(limit, max(0, limit - max(0, held - in_memory)))]


def _cpu_quota(folder: Path, version: int) -> list[float]:
    """CPUs' worth of time that the group may use, if it is limited."""
    if version == 2:
        file = folder / "cpu.max"
        parts = file.read_text(encoding="utf-8").split() if file.is_file() else []
        return [int(parts[0]) / int(parts[1])] if len(parts) == 2 and parts[0] != "max" else []
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return [quota / period] if quota is not None and quota > 0 and period else []


def _limit(file: Path) -> int | None:
    """A limit in bytes; v1 writes "none" as a number near 2^63."""
    value = _number(file)
    return None if value is None or value >= 1 << 60 else value


def _number(file: Path) -> int | None:
    """The integer in a file; None where there is no file or it says `max`."""
    text = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
    return None if text == "max" else int(text)
