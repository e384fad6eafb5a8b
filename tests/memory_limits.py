"""Memory limits that the kernel itself enforces on a process, for tests of what happens when they are hit."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


def address_space_bytes(pid: int) -> int:
    """VmSize: all that a process has mapped."""
    line = next(t for t in Path(f"/proc/{pid}/status").read_text().splitlines() if t.startswith("VmSize:"))
    return int(line.split()[1]) * 1024


def limit_address_space(pid: int, limit_bytes: int) -> None:
    """RLIMIT_AS of a running process: a mapping beyond it fails, and the process hears of it."""
    import resource

    resource.prlimit(pid, resource.RLIMIT_AS, (limit_bytes, limit_bytes))


class Cgroup:
    """A memory cgroup. A process brings none of what it holds: the limit counts what it takes later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take_in(self, pid: int) -> None:
        """Count all that this process allocates from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How many processes of this group the kernel has killed for lack of memory."""
        for name in ("memory.oom_control", "memory.events"):
            if (self.folder / name).exists():
                words = (line.split() for line in (self.folder / name).read_text().splitlines())
                return next((int(count) for key, count in words if key == "oom_kill"), 0)
        return 0


@contextlib.contextmanager
def cgroup(limit_bytes: int) -> Iterator[Cgroup]:
    """A cgroup of version 1 or 2 without swap; skips the test where this user cannot make one."""
    if sys.platform != "linux":
        pytest.skip("cgroups are Linux's")
    v1 = (ROOT / "memory").is_dir()
    folder = (ROOT / "memory" if v1 else ROOT) / f"edge-sdk-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    try:
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if v1 else ("memory.max",)
        if not (folder / names[0]).exists():
            pytest.skip("the memory controller is not enabled for cgroups here")
        for name in names:
            if (folder / name).exists():
                (folder / name).write_text(str(limit_bytes))
        if not v1 and (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        yield Cgroup(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """The last process may still be on its way out."""
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
