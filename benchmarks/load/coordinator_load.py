"""A coordinator under load: the paper's 1,613 devices taking part, then 10,000 that mostly wait.

    python -m benchmarks.coordinator_load                # some minutes
    python -m benchmarks.coordinator_load --quick        # under two minutes
    python -m benchmarks.coordinator_load --json FILE --plot FILE.png

Real HTTP between two processes on one machine: the coordinator as a host starts it, and this one, which is
all the devices. Uploads are measured against a bare aiohttp server that writes and fsyncs the same bytes
(benchmarks/load/sink.py): same files, same connections, same client, in turns within the same run. An upload
here is HEAD, PATCH and POST up to the 202, whose file and row are on disk. Latencies are of devices that come
spread over time, and of those that poll; while the coordinator is saturated they would say how long the
queue was.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import command
from benchmarks.common.plotting import drawing
from benchmarks.load.cases import MODEL, PAPER_DEVICES, TYPES, Template, configuration, templates
from benchmarks.load.client import Connection, Tally, each, head_of
from benchmarks.load.devices import Device, hand_in, join, patiently, take_part
from benchmarks.load.plot import draw
from benchmarks.load.processes import Server, Watch, coordinator
from edge_sdk.core import messages
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.machine.processor import cpu_name

GOAL_RATIO, GOAL_RSS_BYTES = 0.7, 300e6
TURN = 100  # uploads, about, before it is the other's turn: enough that its end, when few are left, is short
CONNECTIONS = 32  # uploads at a time
BUFFER = 100  # updates in a version while devices take part


@dataclass(frozen=True)
class Plan:
    """How much load."""

    uploads: int  # devices whose uploads are timed against the sink
    active: int  # devices that do a whole assignment each, at their own time
    active_s: float  # over which they come
    idle: int  # devices that poll at the end
    idle_s: float
    retry_s: float = 10.0  # the host's policy
    dtype: WireDtype = "float32"


FULL = Plan(uploads=PAPER_DEVICES, active=PAPER_DEVICES, active_s=90.0, idle=10_000, idle_s=75.0)
QUICK = Plan(uploads=404, active=404, active_s=30.0, idle=4_000, idle_s=15.0)


class Run:
    """One measurement, phase by phase."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.kinds: tuple[Template, ...] = templates(plan.dtype)
        policy = {"buffer_size": 1 + plan.uploads, "quorum": 1 + plan.uploads}
        self.server = coordinator(folder, configuration(folder, plan.dtype, policy))
        self.data = folder / "data"
        (folder / "sink").mkdir()
        self.sink = Server(["benchmarks.load.sink", str(folder / "sink")], folder / "sink.log")
        self.watch = Watch(self.server)
        self.devices: list[Device] = []
        self.tally = Tally()
        self.found: dict[str, Any] = {}

    async def go(self) -> dict[str, Any]:
        """All phases."""
        self.server.start()
        self.sink.start()
        watching = asyncio.create_task(self.watch.run())
        try:
            await self.join(PAPER_DEVICES)
            await self.throughput()
            self.anew()
            await self.join(PAPER_DEVICES)
            await self.active()
            await self.join(self.plan.idle)
            await self.idle()
        finally:
            watching.cancel()
            self.found["exit_code"] = self.server.stop()
            self.sink.kill()
        return self.result()

    def anew(self) -> None:
        """Another federation, with buffers of a usual size: no version was to be made of what was timed."""
        self.server.kill()
        self.devices.clear()
        folder = self.folder / "active"
        folder.mkdir()
        policy = {"buffer_size": BUFFER, "timeout_s": 60.0, "lease_s": 600.0, "concurrency": PAPER_DEVICES}
        policy["retry_s"] = self.plan.retry_s
        self.server.arguments = coordinator(folder, configuration(folder, self.plan.dtype, policy)).arguments
        self.server.log = folder / "coordinator.log"
        self.data = folder / "data"
        self.server.start()

    def say(self, phase: str) -> None:
        """Begin a phase."""
        self.watch.phase = phase
        print(f"{time.strftime('%H:%M:%S')}  {phase}", file=sys.stderr, flush=True)

    def connections(self, count: int, server: Server | None = None) -> list[Connection]:
        """So many, to the coordinator unless told otherwise."""
        return [Connection((server or self.server).port) for _ in range(count)]

    async def join(self, devices: int) -> None:
        """Enrol until there are so many."""
        self.say(f"joining, up to {devices}")
        token = (self.data / "join-token").read_text().strip()
        self.host_token = (self.data / "host-token").read_text().strip()
        lines = self.connections(CONNECTIONS)

        async def one(worker: int, number: int) -> None:
            self.devices.append(await join(lines[worker], self.tally, token, number, self.kinds))

        await each(list(range(len(self.devices), devices)), CONNECTIONS, one)
        hang_up(lines)

    async def throughput(self) -> None:
        """The same files to the sink and to the coordinator, in turns."""
        self.say("leases")
        lines, sink_lines = self.connections(CONNECTIONS), self.connections(CONNECTIONS, self.sink)
        ignored = Tally()

        async def ask(worker: int, device: Device) -> None:
            device.took(await patiently("ask", lines[worker], ignored, device.ask()))

        async def deliver(worker: int, device: Device) -> None:
            if await hand_in(device, lines[worker], ignored):
                self.watch.uploaded_bytes += device.kind.size_bytes

        async def pour(worker: int, device: Device) -> None:
            tail = device.kind.tail(device.file_number)
            head = head_of("PUT", f"/{device.number}", "x", device.kind.size_bytes)
            await ignored.timed("sink", sink_lines[worker], head, memoryview(device.kind.body), tail)

        devices = self.devices[: self.plan.uploads]
        await each(devices, CONNECTIONS, ask)
        self.say("uploads and sink")
        servers = {"sink": self.sink, "ingest": self.server}
        sent, seconds, cpu_s = (dict.fromkeys(servers, 0.0) for _ in range(3))
        shares = []
        turns = max(1, len(devices) // TURN)
        for turn in range(turns):
            part = devices[turn * len(devices) // turns : (turn + 1) * len(devices) // turns]
            size, took = sum(device.kind.size_bytes for device in part), {}
            for name in ("sink", "ingest") if turn % 2 else ("ingest", "sink"):
                # Sink files stay until the end: freeing their blocks would slow down whoever writes next.
                own, theirs = time.process_time(), servers[name].cpu_s()
                took[name] = await each(part, CONNECTIONS, pour if name == "sink" else deliver)
                shares.append((time.process_time() - own) / took[name])
                cpu_s[name] += servers[name].cpu_s() - theirs
            for name, took_s in took.items():
                sent[name] += size
                seconds[name] += took_s
            print({k: round(size / v / 1e6) for k, v in took.items()}, file=sys.stderr, flush=True)
        hang_up(lines + sink_lines)
        self.found |= {f"{name}_mb_s": sent[name] / seconds[name] / 1e6 for name in sent}
        self.found |= {f"{name}_cpu_ms": 1e3 * cpu_s[name] / len(devices) for name in sent}  # of an upload
        self.found["client_processor_share"] = sum(shares) / len(shares)
        self.found |= {"uploads": len(devices), "uploaded_bytes": sent["ingest"]}
        self.found["at_full_load"] = ignored.quantiles()
        self.tally.errors += ignored.errors

    async def active(self) -> None:
        """Every device does a whole assignment, each on a connection of its own, spread over the time."""
        self.say("active")
        lines = self.connections(self.plan.active)
        done = []

        async def one(line: Connection, device: Device) -> None:
            await asyncio.sleep(random.uniform(0.0, self.plan.active_s))
            done.append(await take_part(device, line, self.tally, self.plan.dtype))
            self.watch.uploaded_bytes += device.kind.size_bytes

        watching = asyncio.create_task(self.look())
        await asyncio.gather(*map(one, lines, self.devices))
        watching.cancel()
        hang_up(lines)
        self.found["active_devices"] = sum(done)
        line = Connection(self.server.port)
        status = await self.tally.timed("status", line, head_of("GET", messages.STATUS, self.host_token))
        self.found["versions"] = status.json()["version"]
        line.close()

    async def look(self) -> None:
        """What a host's screen does: the status every two seconds."""
        line = Connection(self.server.port)
        request = head_of("GET", messages.STATUS, self.host_token)
        try:
            while True:
                await self.tally.timed("status", line, request)
                await asyncio.sleep(2.0)
        finally:
            line.close()

    async def idle(self) -> None:
        """All devices keep a connection and ask again whenever they are told to."""
        self.say(f"{len(self.devices)} idle devices")
        lines = self.connections(len(self.devices))
        polls = Tally()
        ends = time.monotonic() + self.plan.idle_s
        began_polls = time.monotonic()

        async def one(line: Connection, device: Device) -> None:
            await asyncio.sleep(random.uniform(0.0, min(20.0, self.plan.idle_s)))
            while time.monotonic() < ends:
                if device.assignment is None:
                    reply = await polls.timed("poll", line, device.ask())
                    wait_s = reply.retry_after_s or 5.0
                    device.took(reply)
                else:
                    await polls.timed("heartbeat of the idle", line, device.beat(1))
                    wait_s = 5.0
                await asyncio.sleep(wait_s * random.uniform(1.0, 1.25))

        watching = asyncio.create_task(self.look())
        await asyncio.gather(*map(one, lines, self.devices))
        watching.cancel()
        seconds = time.monotonic() - began_polls
        hang_up(lines)
        self.found["polls_per_s"] = len(polls.times_s["poll"]) / seconds
        self.tally.times_s |= polls.times_s
        self.tally.errors += polls.errors
        self.tally.waits += polls.waits

    def result(self) -> dict[str, Any]:
        """All that was found."""
        found, watch = self.found, self.watch
        phases = list(dict.fromkeys(sample.phase for sample in watch.samples))
        return {
            **found,
            "ratio": found["ingest_mb_s"] / found["sink_mb_s"],
            "routes": self.tally.quantiles(),
            "rss_max_bytes": watch.largest("rss_bytes"),
            "files_max": watch.largest("files"),
            "phases": {
                phase: {f"{what}_max": watch.largest(what, phase) for what in ("rss_bytes", "files")}
                for phase in phases
            },
            "devices": PAPER_DEVICES,
            "idle_devices": len(self.devices),
            "told_to_wait": self.tally.waits,
            "errors": self.tally.errors[:20],
            "error_count": len(self.tally.errors),
            "dtype": self.plan.dtype,
            "samples": [asdict(sample) for sample in watch.samples],
        }


def hang_up(lines: list[Connection]) -> None:
    """Close all of them."""
    for line in lines:
        line.close()


def show(found: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    console.print(
        f"uploads   sink {found['sink_mb_s']:.0f} MB/s   coordinator {found['ingest_mb_s']:.0f} MB/s   "
        f"ratio {found['ratio']:.2f} (goal {GOAL_RATIO})   this client's core: "
        f"{found['client_processor_share']:.0%} busy",
        highlight=False,
    )
    console.print(
        f"processor time of an upload, {found['uploaded_bytes'] / found['uploads'] / 1e6:.1f} MB on average: "
        f"sink {found['sink_cpu_ms']:.1f} ms   coordinator {found['ingest_cpu_ms']:.1f} ms",
        highlight=False,
    )
    table = Table()
    for column in ("route", "requests", "p50 ms", "p99 ms", "longest ms"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for route, row in found["routes"].items():
        cells = (f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms"))
        table.add_row(route, str(row["count"]), *cells)
    console.print(table)
    table = Table()
    for column in ("phase", "RSS MB, most", "open files, most"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, row in found["phases"].items():
        table.add_row(phase, f"{row['rss_bytes_max'] / 1e6:.0f}", str(row["files_max"]))
    console.print(table)
    console.print(
        f"versions {found['versions']}   polls {found['polls_per_s']:.0f}/s   "
        f"told to wait {found['told_to_wait']}   errors {found['error_count']}",
        highlight=False,
    )
    for error in found["errors"]:
        console.print(error, style="red", highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a goal is missed or a request failed."""
    parser = command.parser("coordinator_load", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer uploads and a shorter time")
    parser.add_argument("--dtype", choices=WIRE_DTYPES, default="float32", help="of adapters both ways")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=drawing, help="memory and throughput over time, as PNG")
    parser.add_argument("--folder", type=Path, help="where to keep the data (default: a temporary folder)")
    options = parser.parse_args(arguments)
    base = QUICK if options.quick else FULL
    plan = replace(base, dtype=options.dtype)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    console = command.console(120)
    try:
        found = asyncio.run(Run(plan, folder).go())
    finally:
        shutil.rmtree(folder)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": load}
    types = ", ".join(f"{kind.attention}/{kind.mlp}" for kind in TYPES)
    console.print(f"{cpu_name()}, {os.cpu_count()} cores, load {load}")
    console.print(f"{MODEL.name}; ranks {types} (attention/feed-forward), {plan.dtype}")
    show(found, console)
    command.write_json(options.json, found)
    if options.plot:
        draw(found, options.plot)
    good = found["ratio"] >= GOAL_RATIO and found["rss_max_bytes"] <= GOAL_RSS_BYTES
    return 0 if good and not found["error_count"] else 1


if __name__ == "__main__":
    sys.exit(main())
