"""What carries load: answers made once for many, memory of who is who, limits; and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import coordinator_load, soak
from benchmarks.load.client import BrokenOff, Connection, head_of
from coordinator.adapters.examination import Examination
from coordinator.adapters.ladder import Rung
from coordinator.adapters.serving import Serving
from coordinator.adapters.uploads import Uploads
from coordinator.merging.parallel import cores
from coordinator.service import process_limits, status
from coordinator.service.caches import Assignments
from coordinator.service.door import Door, hash_of
from coordinator.service.status import SharedAnswer
from coordinator.service.trail import Trail
from coordinator.settings import Joining
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import StoredUpdate
from coordinator.storage.store import Store
from edge_sdk.core.errors import Unauthorised
from edge_sdk.core.messages import Assignment, Base, Federation, JoinRequest, Update
from tests.coordinator.devices import FINGERPRINT, Device, configuration, member
from tests.processes import CoordinatorProcess


def test_many_who_ask_at_once_share_one_answer() -> None:
    made: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def make() -> bytes:
        made.append(len(made))
        started.set()
        assert go_on.wait(30.0)
        return str(len(made)).encode()

    async def run() -> None:
        answer = SharedAnswer(make)
        first = asyncio.create_task(answer.get())
        assert await asyncio.to_thread(started.wait, 30.0)
        others = [asyncio.create_task(answer.get()) for _ in range(50)]
        await asyncio.sleep(0.02)
        go_on.set()
        assert await first == b"1"
        assert set(await asyncio.gather(*others)) == {b"2"}  # what began before they asked would not do
        assert await answer.get() == b"3"  # quick to make: always fresh

    asyncio.run(run())
    assert made == [0, 1, 2]


def test_an_answer_that_takes_long_serves_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "FRESH_BELOW_S", 0.01)
    monkeypatch.setattr(status, "SHARE", 10_000)
    made: list[int] = []

    def make() -> bytes:
        time.sleep(0.02)
        made.append(1)
        return b"x"

    async def run() -> None:
        answer = SharedAnswer(make)
        for _ in range(20):
            assert await answer.get() == b"x"

    asyncio.run(run())
    assert len(made) == 1


def test_however_many_ask_for_a_version_its_files_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by those who come while it is made, when the first has gone and others still wait."""
    made: list[Rung] = []

    def make(self: Serving, version: int, rung: Rung) -> None:
        made.append(rung)
        time.sleep(0.05)
        self._path(version, rung).touch()

    monkeypatch.setattr(Serving, "_make", make)
    federation = Federation("f", Base("m", FINGERPRINT, {"q": (8, 8)}), "carry", (2, 4), 4, 2.0, "balanced")
    store = Store(tmp_path / "x.sqlite")

    async def run() -> None:
        serving = Serving(federation, store, Blobs(tmp_path), 10)

        async def one(number: int) -> None:
            await asyncio.sleep(0.002 * number)
            assert (await serving.adapter(1, Rung(2 + 2 * (number % 2)))).exists()

        await asyncio.gather(*map(one, range(100)))
        assert not serving._making  # nothing is kept of it

    asyncio.run(run())
    assert sorted(rung.rank for rung in made) == [2, 4]
    store.close()


def work(id: str) -> Assignment:
    return Assignment(id, 0, 4, 0, 20, 1, 600.0)


def test_assignments_are_remembered_for_their_own_device_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.sqlite")
    for name in "de":
        store.members.add_device(name, name, f"hash of {name}", {}, 1.0)
    for id in "abc":
        store.add_assignment("d", work(id), 1.0)
    known = Assignments(store, kept=2)
    for _ in range(2):  # from the store, then from memory
        assert known.of("a", "d") == work("a")
        assert known.of("a", "e") is None
    assert [known.of(id, "d") for id in "bca"] == [work("b"), work("c"), work("a")]  # more than are kept
    assert known.of("none", "d") is None
    store.close()


def test_the_door_follows_what_another_process_revokes(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path / "x.sqlite")
        store.members.add_device("d", "d", hash_of("one"), {}, 1.0)
        door = Door(tmp_path, store, Joining(), Trail(store.members))
        assert door.authenticate("one", "here") == "d"
        joined = await door.join(
            JoinRequest("e", FINGERPRINT), (tmp_path / "join-token").read_text().strip(), ""
        )
        assert await door.tick() == []
        with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite")) as other:
            other.execute("UPDATE devices SET standing = 'revoked' WHERE id = 'd'")
            other.commit()
        assert await door.tick() == ["d"]
        assert await door.tick() == []
        with pytest.raises(Unauthorised):
            door.authenticate("one", "here")
        assert door.authenticate(joined[1], "here") == joined[0]
        store.close()

    asyncio.run(run())


def refused(device: Device) -> bool:
    try:
        device.transport.federation()
    except Unauthorised:
        return True
    return False


def test_a_credential_revoked_while_it_runs_is_refused_soon(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator, member(coordinator) as device:
        device.work()
        with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
            database.execute("UPDATE devices SET standing = 'revoked'")
            database.commit()
        deadline = time.monotonic() + 30.0
        while not refused(device):
            assert time.monotonic() < deadline
            time.sleep(0.05)


class CountedUploads(Uploads):
    """Checks and keeps nothing; notes how many threads do at a time."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.most, self._at = {"check": 0, "keep": 0}, {"check": 0, "keep": 0}
        self._counting = threading.Lock()
        self._meet = {"check": threading.Barrier(cores()), "keep": threading.Barrier(3 * cores())}

    def _meeting(self, what: str) -> None:
        with self._counting:
            self._at[what] += 1
            self.most[what] = max(self.most[what], self._at[what])
        self._meet[what].wait(30.0)
        time.sleep(0.02)  # who may come too does
        with self._counting:
            self._at[what] -= 1

    def check_adapter(self, device: str, assignment: Assignment, update: Update) -> StoredUpdate:
        self._meeting("check")
        return StoredUpdate(assignment.id, device, assignment.version, update)

    def keep(self, stored: StoredUpdate) -> bool:
        self._meeting("keep")
        return True


def test_no_more_uploads_are_checked_at_a_time_than_there_are_cores(tmp_path: Path) -> None:
    """And all of them wait for the disk together."""
    federation = Federation("f", Base("m", FINGERPRINT, {"q": (8, 8)}), "carry", (2, 4), 4, 2.0, "balanced")
    blobs = Blobs(tmp_path)
    with contextlib.closing(Store(tmp_path / "coordinator.sqlite")) as store:
        uploads = CountedUploads(federation, store, blobs, Examination(federation, store, blobs, None, None))
        work, update = Assignment("a", 0, 2, 2, 5, 0, 60.0), Update("0" * 64, 1, 2, 1, 1, 1.0, 1.0, 1.0)
        with ThreadPoolExecutor(3 * cores()) as pool:
            taken = [pool.submit(uploads.take_in, "new", work, update) for _ in range(3 * cores())]
        assert all(future.result()[1] for future in taken)
    assert uploads.most == {"check": cores(), "keep": 3 * cores()}


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard < 128:
        pytest.skip("no hard limit to run into")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(100, hard), hard))
        notice = process_limits.raise_file_limit(wanted=hard + 1)
        assert notice is not None
        assert str(hard) in notice
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
        assert process_limits.raise_file_limit(wanted=64) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep less")
def test_what_lies_free_between_things_in_use_goes_back_to_the_system() -> None:
    program = """
import psutil
from coordinator.service.process_limits import give_memory_back
from edge_sdk.system.heap import trim_heap

def resident():
    return psutil.Process().memory_info().rss

give_memory_back()
large, small = [], []
for _ in range(300):
    large.append(bytearray(b"x") * 200_000)
    small.append(bytearray(b"x") * 5_000)
large.clear()
before = resident()
trim_heap()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60.0)
    assert int(done.stdout) > 0.8 * 300 * 200_000


def test_the_load_benchmark_measures_every_route_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_load, "PAPER_DEVICES", 12)
    plan = coordinator_load.Plan(
        uploads=8, active=12, active_s=0.5, idle=40, idle_s=2.0, retry_s=0.5, dtype="int8"
    )
    found = asyncio.run(coordinator_load.Run(plan, tmp_path).go())
    assert found["errors"] == []
    routes = {"ask", "heartbeat", "join", "offset", "poll", "status", "update", "upload"}
    assert routes <= set(found["routes"])
    assert found["ingest_mb_s"] > 0
    assert found["sink_mb_s"] > 0
    assert found["ingest_cpu_ms"] > 0
    assert found["ratio"] == pytest.approx(found["ingest_mb_s"] / found["sink_mb_s"])
    assert found["active_devices"] == 12
    assert found["rss_max_bytes"] > 10e6


def test_a_request_that_meets_a_closing_connection_is_sent_again_and_an_upload_is_not() -> None:
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the first request of a connection, and closes it at the second."""
        for number in range(2):
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            if number == 0:
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                await writer.drain()
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            line = Connection(server.sockets[0].getsockname()[1])
            request = head_of("GET", "/", "x")
            assert [(await line.send(request)).status for _ in range(2)] == [204, 204]
            assert len(asked) == 3
            with pytest.raises((BrokenOff, ConnectionError)):
                await line.send(request, b"")
            assert len(asked) == 4
            line.close()

    asyncio.run(go())


def test_a_short_soak_loses_nothing() -> None:
    found = soak.soak(soak.Plan(seconds=9.0, devices=16, kill_every_s=3.0))
    assert found["problems"] == []
    assert found["strange_answers"] == []
    assert found["tracebacks"] == 0
    assert found["kills"] >= 1
    assert found["acknowledged"] > 0


def test_the_soak_sees_what_is_lost(tmp_path: Path) -> None:
    """Its eyes, on a folder with one of each fault."""
    store = Store(tmp_path / "coordinator.sqlite")
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        row = "INSERT INTO updates(assignment, device, version, record, digest, received_at, merged_version, "
        row += "weight, rejected) VALUES (?, 'd', 0, '{}', 'x', 1.0, ?, ?, ?)"
        for values in (("in", 1, 0.5, None), ("both", 1, 0.4, "rotten"), ("buffered", None, None, None)):
            database.execute(row, values)
        columns = "version, digest, rank, energy, discarded_energy, published_at"
        database.execute(f"INSERT INTO versions({columns}) VALUES (1, '{'ab' * 32}', 4, 1.0, 0.0, 1.0)")
        database.execute(f"INSERT INTO versions({columns}) VALUES (3, '{'cd' * 32}', 4, 1.0, 0.0, 1.0)")
        database.commit()
    found = soak.examine(tmp_path, ["in", "in", "both", "buffered", "lost"])
    assert found["problems"] == [
        "update in was acknowledged 2 times as a new one",
        "update both is in version 1 and left out",
        "update lost is lost",
        "versions have a gap",
        "version 1 is not whole",
        "the weights of version 1 sum to 0.9",
        "version 3 is not whole",
        "the weights of version 3 sum to None",
    ]
