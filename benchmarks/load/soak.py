"""Minutes of trouble: stragglers, drop-outs, cut uploads, and a coordinator that is killed again and again.

    python -m benchmarks.soak --minutes 10     # a SIGKILL a minute
    python -m benchmarks.soak --minutes 1      # one every ten seconds
    python -m benchmarks.soak --json FILE

A real coordinator process, and light devices over real HTTP: they follow the protocol, with its pauses and
its back-off, and wait where others train. 30 % of them are stragglers, ten times as slow, whose leases run
out; in one assignment of ten a device drops out and forgets it; in one of ten its upload is cut half-way. At
the end every update that got its 202 must be in exactly one version, or in the buffer, or left out with a
reason; versions must be whole. Exit code 1 if anything is lost, or if memory was not flat.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.aggregation.cases import Model
from benchmarks.common import command
from benchmarks.load.cases import configuration, templates
from benchmarks.load.client import BrokenOff, Connection, Tally
from benchmarks.load.devices import Device, join
from benchmarks.load.processes import Watch, coordinator
from edge_sdk.core.adapter_file.codec import sha256_file
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.machine.processor import cpu_name

MODEL = Model("narrow", 64, 172, 1)
TYPES = (Ranks(2, 2), Ranks(8, 8), Ranks(8, 48), Ranks(48, 48))
POLICY = {"buffer_size": 20, "timeout_s": 5.0, "lease_s": 15.0, "retry_s": 1.0}
STRAGGLERS, DROP_OUTS, CUTS = 0.3, 0.1, 0.1
WORK_S, SLOWER = 2.0, 10.0  # what an assignment takes at the median, and how many times that of a straggler
BEAT_S = 1.0
DOWN_S = 1.0  # how long a killed coordinator stays away
FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.25, 5.0
GOAL_RSS_BYTES = 300e6
OUTAGE = (BrokenOff, OSError, TimeoutError)


@dataclass
class Books:
    """What devices were told."""

    acknowledged: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    dropped_out: int = 0
    cut: int = 0
    abandoned: int = 0
    outages: int = 0
    strange: list[str] = field(default_factory=list)  # answers that the protocol does not have


class Member:
    """One light device, as the protocol has it."""

    def __init__(self, device: Device, connection: Connection, books: Books, straggles: bool) -> None:
        self._device, self._connection, self._books = device, connection, books
        self._slowness = SLOWER if straggles else 1.0
        self._chance = random.Random(device.number)
        self._tally = Tally()
        self.ends = False

    def hang_up(self) -> None:
        """Close the connection."""
        self._connection.close()

    async def live(self) -> None:
        """Take part until `ends` is set; every outage is waited out with back-off and jitter."""
        backoff_s = FIRST_BACKOFF_S
        while not self.ends:
            try:
                await self._once()
                backoff_s = FIRST_BACKOFF_S
            except OUTAGE:
                self._books.outages += 1
                await asyncio.sleep(backoff_s * self._chance.uniform(0.5, 1.5))
                backoff_s = min(MOST_BACKOFF_S, 2 * backoff_s)

    async def _send(self, route: str, *parts: bytes | memoryview) -> Any:
        reply = await self._tally.timed(route, self._connection, *parts)
        if reply.status >= 500 and reply.retry_after_s is None:
            self._books.strange.append(f"{route}: {reply.status} {reply.body[:200]!r}")
            raise BrokenOff(reply.status)
        return reply

    async def _once(self) -> None:
        """One assignment, or one wait. What was begun before an outage is gone on with."""
        device = self._device
        if device.assignment is None:
            reply = await self._send("ask", device.ask())
            if not device.took(reply):
                await asyncio.sleep((reply.retry_after_s or 1.0) * self._chance.uniform(1.0, 1.1))
                return
            if self._chance.random() < DROP_OUTS:
                self._books.dropped_out += 1
                device.assignment = None
                await asyncio.sleep(self._chance.uniform(1.0, 4 * WORK_S))
                return
            request = device.download("int8")
            if request:
                await self._send("download", request)
            if not await self._work():
                return
        await self._hand_in()

    async def _work(self) -> bool:
        """Wait as long as training takes, with beats; whether there is something to hand in."""
        left_s = WORK_S * self._slowness * self._chance.lognormvariate(0.0, 0.5)
        steps = 0
        while left_s > 0 and not self.ends:
            await asyncio.sleep(min(BEAT_S, left_s))
            left_s, steps = left_s - BEAT_S, steps + 1
            with contextlib.suppress(*OUTAGE):  # a beat that nobody hears changes nothing
                reply = await self._send("heartbeat", self._device.beat(steps))
                directive = reply.json()["directive"] if reply.status == 200 else "abandon"
                if directive == "finish":
                    return True
                if directive == "abandon":
                    self._books.abandoned += 1
                    self._device.assignment = None
                    return False
        return True

    async def _hand_in(self) -> None:
        """HEAD, PATCH, POST. A refusal ends the assignment."""
        device = self._device
        offset = (await self._send("offset", device.offset())).offset or 0
        if offset < device.kind.size_bytes:
            head, *rest = device.upload(offset)
            if self._chance.random() < CUTS:
                await self._cut(head, rest)
            reply = await self._send("upload", head, *rest)
            if reply.status == 409:
                return  # asked again where it stands
            if reply.status == 503:
                await asyncio.sleep(reply.retry_after_s)
                return
        reply = await self._send("update", device.update())
        if reply.status == 202:
            self._books.acknowledged.append(reply.json()["update_id"])
        elif reply.status == 503:
            await asyncio.sleep(reply.retry_after_s)
            return
        else:
            self._books.refused[reply.json().get("title", str(reply.status))] += 1
        device.delivered += 1
        device.assignment = None

    async def _cut(self, head: bytes | memoryview, rest: list[bytes | memoryview]) -> None:
        """Send half of a body and hang up."""
        self._books.cut += 1
        await self._connection.open()
        whole = bytes(head) + b"".join(map(bytes, rest))
        half = len(head) + (len(whole) - len(head)) // 2
        await self._connection.send_only(whole[:half])
        self._connection.close()
        raise BrokenOff("cut on purpose")


@dataclass
class Plan:
    """How long, how many, how often."""

    seconds: float
    devices: int = 200
    kill_every_s: float = 60.0


class Soak:
    """One run in a folder."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        config = configuration(folder, "int8", POLICY, MODEL, TYPES)
        self.server = coordinator(folder, config)
        self.watch = Watch(self.server)
        self.books = Books()
        self.starts_s: list[float] = []
        self.rss_before_kills: list[int] = []

    async def go(self) -> dict[str, Any]:
        """Run it, and look at what is left."""
        self.starts_s.append(await asyncio.to_thread(self.server.start))
        self.server.arguments[-1] = str(self.server.port)  # the same after every kill
        watching = asyncio.create_task(self.watch.run())
        try:
            members = await self._members()
            lives = [asyncio.create_task(member.live()) for member in members]
            await self._kill_now_and_then(time.monotonic() + self.plan.seconds)
            for member in members:
                member.ends = True
            await asyncio.wait(lives, timeout=60.0)
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)
            for member in members:
                member.hang_up()
            await asyncio.sleep(1.0)
            code = await asyncio.to_thread(self.server.stop)
        finally:
            watching.cancel()
            self.server.kill()
        return self._result(code)

    async def _members(self) -> list[Member]:
        kinds = templates("int8", MODEL, TYPES)
        token = (self.folder / "data" / "join-token").read_text().strip()
        members = []
        for number in range(self.plan.devices):
            line = Connection(self.server.port)
            device = await join(line, Tally(), token, number, kinds)
            straggles = number % 10 < 10 * STRAGGLERS
            members.append(Member(device, line, self.books, straggles))
        return members

    async def _kill_now_and_then(self, until: float) -> None:
        while (left_s := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, self.plan.kill_every_s * random.uniform(0.8, 1.2)))
            if time.monotonic() >= until:
                return
            self.watch.look()
            if self.watch.samples:
                self.rss_before_kills.append(self.watch.samples[-1].rss_bytes)
            self.server.kill()
            await asyncio.sleep(DOWN_S)
            self.starts_s.append(await asyncio.to_thread(self.server.start))

    def _result(self, code: int) -> dict[str, Any]:
        books = self.books
        _, *tracebacks = self.server.log.read_text(errors="replace").split("Traceback")
        found = examine(self.folder / "data", books.acknowledged)
        return {
            **found,
            "seconds": self.plan.seconds,
            "devices": self.plan.devices,
            "kills": len(self.starts_s) - 1,
            "slowest_start_s": max(self.starts_s),
            "acknowledged": len(books.acknowledged),
            "refused_at_the_door": dict(books.refused),
            "dropped_out": books.dropped_out,
            "cut_uploads": books.cut,
            "abandoned": books.abandoned,
            "outages": books.outages,
            "strange_answers": books.strange[:10],
            "rss_max_bytes": self.watch.largest("rss_bytes"),
            "rss_before_kills_bytes": self.rss_before_kills,
            "files_max": self.watch.largest("files"),
            "exit_code": code,
            "tracebacks": len(tracebacks),
            "first_traceback": tracebacks[0][:2000] if tracebacks else "",
        }


def examine(data: Path, acknowledged: list[str]) -> dict[str, Any]:
    """Where every acknowledged update is, from the files alone. `problems` is empty if all is well."""
    problems = []
    with contextlib.closing(sqlite3.connect(data / "coordinator.sqlite")) as database:
        rows = database.execute("SELECT assignment, merged_version, rejected FROM updates").fetchall()
        versions = database.execute(
            "SELECT version, digest, collected FROM versions ORDER BY version"
        ).fetchall()
        weights = dict(
            database.execute(
                "SELECT merged_version, SUM(weight) FROM updates WHERE merged_version IS NOT NULL "
                "GROUP BY merged_version"
            )
        )
        if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            problems.append("the database is damaged")
    where = {id: (merged, rejected) for id, merged, rejected in rows}
    places: Counter[str] = Counter()
    for id, times in Counter(acknowledged).items():
        if times > 1:
            problems.append(f"update {id} was acknowledged {times} times as a new one")
        merged, rejected = where.get(id, (None, "no row"))
        if id not in where:
            problems.append(f"update {id} is lost")
        elif merged is not None and rejected:
            problems.append(f"update {id} is in version {merged} and left out")
        places["merged" if merged is not None else "left out" if rejected else "buffered"] += 1
    if [number for number, _, _ in versions] != list(range(1, len(versions) + 1)):
        problems.append("versions have a gap")
    for number, digest, collected in versions:
        path = data / "blobs" / digest[:2] / digest
        if not collected and not (path.exists() and sha256_file(path) == digest):
            problems.append(f"version {number} is not whole")
        if abs(weights.get(number, 0.0) - 1.0) > 1e-6:
            problems.append(f"the weights of version {number} sum to {weights.get(number)}")
    left_out = {id for id, (_, rejected) in where.items() if rejected}
    return {
        "problems": problems,
        "versions": len(versions),
        "places": dict(places),
        "stored": len(rows),
        "unheard": len(set(where) - left_out - set(acknowledged)),  # stored, and the answer was never heard
        "left_out": len(left_out),  # stored, and declined with a reason
    }


def show(found: dict[str, Any], console: Console) -> None:
    """A table for people."""
    table = Table(show_header=False)
    for key, value in found.items():
        if key == "rss_max_bytes":
            value = f"{value / 1e6:.0f} MB"
        elif key == "rss_before_kills_bytes":
            value = ", ".join(f"{rss / 1e6:.0f}" for rss in value) + " MB"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {count}" for name, count in sorted(value.items()))
        elif isinstance(value, list):
            value = "; ".join(map(str, value[:10])) or "none"
        elif isinstance(value, float):
            value = f"{value:.1f}"
        table.add_row(key.replace("_", " "), str(value))
    console.print(table)


def soak(plan: Plan) -> dict[str, Any]:
    """Run in a folder of its own."""
    folder = Path(tempfile.mkdtemp())
    try:
        return asyncio.run(Soak(plan, folder).go())
    finally:
        shutil.rmtree(folder)


def is_good(found: dict[str, Any]) -> bool:
    """Whether nothing was lost, nothing strange was said, and memory stayed within its bound."""
    bad = found["problems"] or found["strange_answers"] or found["tracebacks"] or found["exit_code"]
    return not bad and found["acknowledged"] > 0 and found["rss_max_bytes"] <= GOAL_RSS_BYTES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 if anything was lost."""
    parser = command.parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    every_s = 60.0 if options.minutes >= 5 else 10.0
    found = soak(Plan(60.0 * options.minutes, options.devices, every_s))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": load}
    show(found, command.console(120))
    command.write_json(options.json, found)
    return 0 if is_good(found) else 1


if __name__ == "__main__":
    sys.exit(main())
