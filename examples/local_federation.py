"""A whole federation on this machine: one coordinator process, several device processes, a live table.

Used by `examples.demo` and `examples.natural_instructions`. Processes talk over HTTP on the loopback address
as they would over a network; nothing is shared between them but that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import InputError, Unreachable
from edge_sdk.core.messages import DeviceStatus, Status

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
PLAIN_LINE_EVERY_S = 10.0  # where there is no terminal to redraw


@dataclass
class Device:
    """One device process, and how to start it (again)."""

    name: str
    command: list[str]
    home: Path
    note: str = ""  # shown beside it: straggler, killed, back …
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its output goes to `device.log` in its home."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "device.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=one_thread())

    def kill(self) -> None:
        """Pull the plug: SIGKILL, no warning."""
        if self.process:
            self.process.kill()
            self.process.wait()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None


@dataclass
class LocalFederation:
    """The processes of one run below `folder`."""

    folder: Path
    config: str  # TOML of the coordinator
    devices: list[Device] = field(default_factory=list)
    url: str = ""
    token: str = ""
    _coordinator: subprocess.Popen[bytes] | None = None
    _status: Transport | None = None

    def start_coordinator(self) -> None:
        """Start the coordinator on a free port and wait until it listens.

        Raises:
            InputError: it ended or did not listen in time; names its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "federation.toml").write_text(self.config)
        data, log = self.folder / "coordinator", self.folder / "coordinator.log"
        command = [sys.executable, "-m", "coordinator.cli", "serve", "--data", str(data), "--port", "0"]
        with log.open("wb") as out:
            self._coordinator = subprocess.Popen(
                [*command, "--config", str(self.folder / "federation.toml")],
                stdout=out,
                stderr=out,
                env=one_thread(),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "listening on " not in (text := log.read_text()):
            if self._coordinator.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"the coordinator did not start; {log} says: {text.strip()[-300:]}")
            time.sleep(0.1)
        self.url = text.split("listening on ")[1].split()[0]
        self.token = (data / "join-token").read_text().strip()
        self._status = Transport(self.url, (data / "host-token").read_text().strip())

    def status(self) -> Status:
        """What the coordinator says of itself."""
        if self._status is None:
            raise InputError("the coordinator has not been started")
        return self._status.status()

    def watch(self, until: Callable[[Status, float], bool], title: str) -> float:
        """Show the federation while it runs, until `until(status, seconds)`; returns the seconds.

        Raises:
            InputError: a device process ended by itself; names its log.
        """
        console, started, last_line = Console(), time.monotonic(), 0.0
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                seconds = time.monotonic() - started
                try:
                    status = self.status()
                except Unreachable as error:
                    raise InputError(
                        f"the coordinator is gone; see {self.folder / 'coordinator.log'}"
                    ) from error
                self._require_devices()
                if console.is_terminal:
                    live.update(self._picture(status, seconds, title))
                elif seconds - last_line >= PLAIN_LINE_EVERY_S:
                    last_line = seconds
                    console.print(self._line(status, seconds), highlight=False)
                if until(status, seconds):
                    return seconds
                time.sleep(0.5)

    def _require_devices(self) -> None:
        for device in self.devices:
            code = device.process.poll() if device.process else None
            if code is not None and code > 0:
                lines = (device.home / "device.log").read_text(errors="replace").strip().splitlines()
                raise InputError(f"device {device.name} ended with code {code}: {lines[-1] if lines else ''}")

    def _picture(self, status: Status, seconds: float, title: str) -> Group:
        """A frame of the live view."""
        head = Text.assemble(
            (f"{title}  ", "bold"),
            f"{seconds:4.0f} s   version {status.version}   buffer {status.buffered}/{status.buffer_size}",
            "   merging" if status.aggregating else "",
        )
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("device", "r", "now", "updates", "staleness", ""):
            table.add_column(column, justify="right" if column in ("r", "updates", "staleness") else "left")
        known = {d.name: d for d in status.devices}
        for device in self.devices:
            table.add_row(device.name, *_cells(known.get(device.name), device))
        return Group(head, table)

    def _line(self, status: Status, seconds: float) -> str:
        """The same in one line."""
        parts = [f"{d.name} {d.updates}" for d in status.devices]
        return f"{seconds:4.0f} s  version {status.version:<3} updates: {', '.join(parts) or 'none yet'}"

    def stop_devices(self) -> None:
        """Ask every device to finish, and wait until all have.

        Raises:
            InputError: one did not finish in time or failed; names its log.
        """
        for device in self.devices:
            if device.alive and device.process:
                device.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for device in self.devices:
            if device.process is None:
                continue
            try:
                code = device.process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise InputError(
                    f"device {device.name} did not finish; see {device.home / 'device.log'}"
                ) from error
            if code != 0:
                raise InputError(
                    f"device {device.name} ended with code {code}; see {device.home / 'device.log'}"
                )

    def export(self, out: Path) -> None:
        """Write the newest global adapter as a PEFT folder."""
        command = [sys.executable, "-m", "coordinator.cli", "export"]
        subprocess.run(
            [*command, "--data", str(self.folder / "coordinator"), "--out", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End every process that is left."""
        for device in self.devices:
            if device.alive:
                device.kill()
        if self._status:
            self._status.close()
        if self._coordinator and self._coordinator.poll() is None:
            self._coordinator.terminate()
            try:
                self._coordinator.wait(15)
            except subprocess.TimeoutExpired:
                self._coordinator.kill()


def _cells(known: DeviceStatus | None, device: Device) -> list[Any]:
    """rank, activity, updates, staleness and note of a row."""
    if not device.alive:
        now: Any = Text("down", style="red")
    elif known is None:
        now = Text("starting", style="dim")
    elif known.state == "training" and known.steps:
        now = ProgressBar(total=known.steps, completed=known.steps_done, width=20)
    else:
        now = Text("waiting", style="dim")
    if known is None:
        return ["", now, "", "", device.note]
    rank = str(known.rank) if known.rank else ""
    return [rank, now, str(known.updates), f"{known.mean_staleness:.1f}", device.note]


def one_thread() -> dict[str, str]:
    """The environment of a process that computes on one thread: several on all cores stall each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def fresh_folder(folder: Path) -> Path:
    """An empty folder. What a former run left there goes; anything that is not such a run stays.

    Raises:
        InputError: the folder holds something else.
    """
    marker = folder / "federation.toml"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise InputError(f"{folder} is not empty and holds no earlier run; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_jsonl(path: Path, records: Sequence[dict[str, str]]) -> None:
    """Write records, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
