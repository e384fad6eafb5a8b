"""Whether hostile connections harm the others: heartbeats of 500 good devices beside 30 % that only cost.

    python -m benchmarks.hostile            # two minutes under attack, one before it
    python -m benchmarks.hostile --quick    # half a minute, and 100 devices
    python -m benchmarks.hostile --json FILE

A coordinator as a host starts it, with its default limits; all good devices in this process, each on a
connection of its own, with a heartbeat every two seconds and an update every minute; and all hostile ones in
another (benchmarks/load/hostile_peers.py), which yields to these two. The time without them is of the same
run, just before. The goals: a p99 of good heartbeats of at most 3 times that, no error, and memory that is
flat: in the second half of the attack at most a tenth above the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import command
from benchmarks.load.cases import configuration, templates
from benchmarks.load.client import BrokenOff, Connection, Tally, each
from benchmarks.load.devices import Device, hand_in, join, patiently
from benchmarks.load.processes import Watch, coordinator
from edge_sdk.machine.processor import cpu_name

HOSTILE_SHARE = 0.3  # of all connections
GOAL_RATIO, GOAL_GROWTH = 3.0, 0.1
BEAT_S = 2.0
WORK_S = 60.0  # from a good device's assignment to its update
# As many may join at once as there are good devices here: they have one address, and do not wait for it.
LIMITS = {"joins_minute": 600, "joins_minute_of_address": 600}
POLICY = {"buffer_size": 100, "timeout_s": 60.0, "lease_s": 600.0}


@dataclass(frozen=True)
class Plan:
    """How many, and for how long."""

    devices: int
    calm_s: float
    attack_s: float

    @property
    def hostile(self) -> int:
        """Connections that are their share of all."""
        return round(self.devices * HOSTILE_SHARE / (1 - HOSTILE_SHARE))


FULL = Plan(500, 60.0, 120.0)
QUICK = Plan(100, 15.0, 30.0)


class Run:
    """One measurement."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        config = configuration(folder, "int8", POLICY, limits=LIMITS)
        self.server = coordinator(folder, config)
        self.watch = Watch(self.server)
        self.tallies: dict[str, Tally] = {}
        self.devices: list[Device] = []

    async def go(self) -> dict[str, Any]:
        """All phases."""
        self.server.start()
        watching = asyncio.create_task(self.watch.run())
        token = (self.folder / "data" / "join-token").read_text().strip()
        try:
            await self.enrol(token)
            self.phase("begin")
            living = [asyncio.create_task(self.live(device)) for device in self.devices]
            await asyncio.sleep(WORK_S / 4)
            self.phase("calm")
            await asyncio.sleep(self.plan.calm_s)
            tried = await self.attacked(token)
            self.phase("after")
            await asyncio.sleep(self.plan.calm_s / 4)
            for life in living:
                life.cancel()
            await asyncio.gather(*living, return_exceptions=True)
        finally:
            watching.cancel()
            code = self.server.stop()
        return self.result(tried) | {"exit_code": code}

    def phase(self, name: str) -> None:
        """What is noted from now on is of this one."""
        self.watch.phase = name
        self.tallies[name] = Tally()
        print(f"{time.strftime('%H:%M:%S')}  {name}", file=sys.stderr, flush=True)

    async def enrol(self, token: str) -> None:
        """Let the good devices join."""
        self.phase("joining")
        lines, kinds = [Connection(self.server.port) for _ in range(16)], templates("int8")[:1]

        async def one(worker: int, number: int) -> None:
            self.devices.append(await join(lines[worker], self.tallies["joining"], token, number, kinds))

        await each(list(range(self.plan.devices)), len(lines), one)
        for line in lines:
            line.close()

    async def attacked(self, token: str) -> dict[str, int]:
        """The hostile ones beside the others; how often each of their ways was tried."""
        half = self.plan.attack_s / 2
        self.phase("attack")
        peers = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.load.hostile_peers", str(self.server.port), token),
            *(str(self.plan.hostile), str(self.plan.attack_s)),
            stdout=asyncio.subprocess.PIPE,
        )
        await asyncio.sleep(half)
        self.watch.phase = "attack, second half"
        said, _ = await peers.communicate()
        return dict(json.loads(said))

    async def live(self, device: Device) -> None:
        """A good device: it asks, beats, hands in, and asks again."""
        line = Connection(self.server.port)
        await asyncio.sleep(random.uniform(0.0, WORK_S / 4))
        while True:
            tally = self.tallies[self.watch.phase.split(",")[0]]
            try:
                await self.step(device, line, tally)
            except (BrokenOff, OSError, TimeoutError):
                await asyncio.sleep(1.0)

    async def step(self, device: Device, line: Connection, tally: Tally) -> None:
        """One beat, and now and then an update or a question for work."""
        if device.assignment is None:
            if not device.took(reply := await tally.timed("ask", line, device.ask())):
                await asyncio.sleep((reply.retry_after_s or BEAT_S) * random.uniform(1.0, 1.25))
            return
        await asyncio.sleep(BEAT_S * random.uniform(0.9, 1.1))
        reply = await patiently("heartbeat", line, tally, device.beat(1))
        told = reply.json()["directive"]
        if told == "abandon":
            device.assignment = None
        elif told == "finish" or random.random() < BEAT_S / WORK_S:
            await hand_in(device, line, tally)

    def result(self, tried: dict[str, int]) -> dict[str, Any]:
        """All that was found."""
        routes = {phase: tally.quantiles() for phase, tally in self.tallies.items()}
        calm, attack = routes["calm"]["heartbeat"], routes["attack"]["heartbeat"]
        phases = ("calm", "attack", "attack, second half", "after")
        rss = {phase: self.watch.largest("rss_bytes", phase) for phase in phases}
        return {
            "devices": self.plan.devices,
            "hostile_connections": self.plan.hostile,
            "tried": tried,
            "routes": routes,
            "ratio": attack["p99_ms"] / calm["p99_ms"],
            "rss_max_bytes": rss,
            "files_max": {phase: self.watch.largest("files", phase) for phase in phases},
            "growth": rss["attack, second half"] / rss["attack"] - 1.0,
            "errors": [error for tally in self.tallies.values() for error in tally.errors][:20],
            "log_bytes": (self.folder / "coordinator.log").stat().st_size,
        }


def show(found: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    table = Table()
    for column in ("phase", "route", "requests", "p50 ms", "p99 ms", "longest ms"):
        table.add_column(column, justify="left" if column in ("phase", "route") else "right")
    for phase in ("calm", "attack", "after"):
        for route, row in found["routes"][phase].items():
            cells = (f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "max_ms"))
            table.add_row(phase, route, str(row["count"]), *cells)
    console.print(table)
    memory = ", ".join(f"{phase} {size / 1e6:.0f}" for phase, size in found["rss_max_bytes"].items())
    console.print(f"RSS MB, most: {memory}   open files: {found['files_max']}", highlight=False)
    console.print(
        f"p99 of heartbeats under attack: {found['ratio']:.1f} × without (goal {GOAL_RATIO:.0f})   "
        f"growth of memory {found['growth']:.1%} (goal {GOAL_GROWTH:.0%})   "
        f"log {found['log_bytes'] / 1e3:.0f} KB   errors {len(found['errors'])}",
        highlight=False,
    )
    console.print("tried: " + ", ".join(f"{way} {count}" for way, count in found["tried"].items()))
    for error in found["errors"]:
        console.print(error, style="red", highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a goal is missed or a good request failed."""
    parser = command.parser("hostile", __doc__)
    parser.add_argument("--quick", action="store_true", help="100 devices, half a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where to keep the data (default: a temporary folder)")
    options = parser.parse_args(arguments)
    plan, folder = QUICK if options.quick else FULL, Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = asyncio.run(Run(plan, folder).go())
    finally:
        shutil.rmtree(folder)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": load}
    console = command.console(110)
    console.print(f"{cpu_name()}, {os.cpu_count()} cores, load {load}")
    console.print(f"{plan.devices} good devices, {plan.hostile} hostile connections")
    show(found, console)
    command.write_json(options.json, found)
    good = found["ratio"] <= GOAL_RATIO and found["growth"] <= GOAL_GROWTH
    return 0 if good and not found["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
