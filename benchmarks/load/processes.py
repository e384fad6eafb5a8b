"""The processes under load: started, killed, watched."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from edge_sdk.core.errors import InputError
from examples.local_federation import one_thread

PATIENCE_S = 120.0


@dataclass
class Server:
    """`python -m MODULE ARGUMENTS`, which says "listening on http://HOST:PORT" when it does."""

    arguments: list[str]
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start, and return when it listens: the seconds that took.

        Raises:
            InputError: it ended, or did not listen in time; names its log.
        """
        began = time.monotonic()
        with self.log.open("ab") as log:
            written = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments], stdout=log, stderr=log, env=one_thread()
            )
        while True:
            said = self.log.read_bytes()[written:].decode(errors="replace")
            if found := re.search(r"listening on http://[\d.]+:(\d+)\s", said):
                self.port = int(found[1])
                return time.monotonic() - began
            if self.process.poll() is not None or time.monotonic() - began > PATIENCE_S:
                raise InputError(f"{self.arguments[0]} does not listen; {self.log} says: {said[-300:]}")
            time.sleep(0.02)

    def cpu_s(self) -> float:
        """Processor seconds that it has taken, over all threads and by the system for it."""
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.process = None
        return code


def coordinator(folder: Path, config: Path, port: int = 0) -> Server:
    """`edge-coordinator serve` on `folder`/data; with a port it is the same one after each start."""
    arguments = ["coordinator.cli", "serve", "--data", str(folder / "data"), "--config", str(config)]
    return Server([*arguments, "--port", str(port)], folder / "coordinator.log")


@dataclass
class Sample:
    """One look at a process."""

    at_s: float
    rss_bytes: int
    mapped_bytes: int  # of that, pages of files, which the system takes back when it needs them
    files: int
    cpu_s: float
    uploaded_bytes: int = 0
    phase: str = ""


@dataclass
class Watch:
    """Looks at a server every quarter of a second. `phase` and `uploaded_bytes` are the caller's to set."""

    server: Server
    phase: str = "start"
    uploaded_bytes: int = 0
    samples: list[Sample] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    async def run(self, every_s: float = 0.25) -> None:
        """Until cancelled. A process that is not there at the moment is passed over."""
        while True:
            self.look()
            await asyncio.sleep(every_s)

    def look(self) -> None:
        """Take one sample."""
        if self.server.process is None:
            return
        try:
            process = psutil.Process(self.server.process.pid)
            with process.oneshot():
                times = process.cpu_times()
                memory = process.memory_info()
                sample = Sample(
                    time.monotonic() - self._began,
                    memory.rss,
                    getattr(memory, "shared", 0),
                    process.num_fds(),
                    times.user + times.system,
                    self.uploaded_bytes,
                    self.phase,
                )
        except psutil.Error:
            return
        self.samples.append(sample)

    def largest(self, what: str, phase: str | None = None) -> int:
        """The most of `rss_bytes` or `files`, in one phase or in all."""
        kept = [getattr(s, what) for s in self.samples if phase in (None, s.phase)]
        return max(kept, default=0)
