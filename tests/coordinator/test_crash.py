"""Kill the coordinator whenever it hurts: what got a 202 counts once, and no version is half there."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import OurFault, TheirFault, Unauthorised, Unreachable
from edge_sdk.core.messages import Ask, NotNow
from tests.coordinator.devices import SCALING, Device, configuration, member, random_adapter, update_of
from tests.processes import CoordinatorProcess

KILLS = 10


def rows(coordinator: CoordinatorProcess, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
        return database.execute(query).fetchall()


def check_versions(coordinator: CoordinatorProcess) -> int:
    """Versions run from 1 without a gap, each with updates and, but for old ones, a whole file; how many."""
    versions = rows(coordinator, "SELECT version, digest, collected FROM versions ORDER BY version")
    assert [number for number, _, _ in versions] == list(range(1, len(versions) + 1))
    for number, digest, collected in versions:
        path = coordinator.data / "blobs" / digest[:2] / digest
        assert collected or codec.sha256_file(path) == digest
        weights = rows(coordinator, f"SELECT weight FROM updates WHERE merged_version = {number}")
        assert sum(weight for (weight,) in weights) == pytest.approx(1.0)
    return len(versions)


def settle(coordinator: CoordinatorProcess) -> None:
    """Wait until nothing is left to merge."""
    deadline = time.monotonic() + 30.0
    waiting = "SELECT COUNT(*) FROM updates WHERE merged_version IS NULL AND rejected IS NULL"
    while rows(coordinator, waiting) != [(0,)]:
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        time.sleep(0.05)


def test_an_update_that_got_its_202_survives_a_kill_at_once(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 2})) as coordinator:
        with member(coordinator, "one") as one, member(coordinator, "two") as two:
            work = one.work()
            content = codec.encode(random_adapter(4, 1), SCALING)
            one.hand_in(work, content)
            coordinator.kill()
            coordinator.start()
            assert one.status().buffered == 1
            assert one.waits()  # it is remembered who contributed
            one.transport.deliver(work.id, update_of(content, 4))  # the answer may have been lost: ask again
            two.hand_in(two.work(), seed=2)
            coordinator.kill()  # with a merge due or under way
            coordinator.start()
            settle(coordinator)
        coordinator.stop()
        assert check_versions(coordinator) == 1
        merged = rows(coordinator, "SELECT assignment, merged_version FROM updates")
        assert sorted(version for _, version in merged) == [1, 1]


def test_an_assignment_survives_a_restart(tmp_path: Path) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator,
        member(coordinator) as device,
    ):
        before = device.work()
        coordinator.kill()
        coordinator.start()
        after = device.work()
        assert (after.id, after.seed, after.version) == (before.id, before.seed, before.version)
        device.hand_in(after)


def take_part(device: Device, seed: int, stop: threading.Event, acknowledged: list[str]) -> None:
    """Deliver updates until told to stop, through whatever happens to the coordinator."""
    rank = (2, 4, 8)[seed % 3]
    while not stop.is_set():
        try:
            answer = device.transport.ask(Ask(rank))
            if isinstance(answer, NotNow):
                time.sleep(0.02)
                continue
            reply = device.hand_in(answer, seed=seed)
            acknowledged.append(reply.update_id)
        except (Unreachable, OurFault):
            time.sleep(0.05)


def test_killed_at_random_it_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    chance = random.Random(1)
    acknowledged: list[str] = []
    stop = threading.Event()
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 3})) as coordinator,
        contextlib.ExitStack() as members,
    ):
        devices = [members.enter_context(member(coordinator, f"device {n}")) for n in range(4)]
        threads = [
            threading.Thread(target=take_part, args=(device, seed, stop, acknowledged))
            for seed, device in enumerate(devices)
        ]
        for thread in threads:
            thread.start()
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.1, 0.8))
            coordinator.kill()
            coordinator.start()
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()
        # What is left in the buffer is not due; one more device's update at a time makes it so.
        deadline = time.monotonic() + 30.0
        while devices[0].status().buffered:
            assert time.monotonic() < deadline
            for device in devices:
                with contextlib.suppress(TheirFault):
                    answer = device.transport.ask(Ask(4))
                    if not isinstance(answer, NotNow):
                        acknowledged.append(device.hand_in(answer).update_id)
                        break
            time.sleep(0.1)
        settle(coordinator)
        assert coordinator.stop() == 0

        assert len(acknowledged) == len(set(acknowledged)) > KILLS
        merged = Counter(
            assignment
            for (assignment,) in rows(
                coordinator, "SELECT assignment FROM updates WHERE merged_version IS NOT NULL"
            )
        )
        assert set(acknowledged) <= set(merged)  # a 202 may have been lost on the way: then it counts too
        assert max(merged.values()) == 1
        versions = check_versions(coordinator)
        assert versions > 3
        ranks = rows(coordinator, "SELECT DISTINCT merged_version FROM updates ORDER BY merged_version")
        assert [version for (version,) in ranks] == list(range(1, versions + 1))
        assert rows(coordinator, "PRAGMA integrity_check") == [("ok",)]
        log = coordinator.log.read_text()
        assert "Traceback" not in log, log


def test_a_rotten_blob_costs_its_own_update_only(tmp_path: Path) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 2})) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
    ):
        content = codec.encode(random_adapter(4, 1), SCALING)
        one.hand_in(one.work(), content)
        digest = update_of(content, 4).digest
        (coordinator.data / "blobs" / digest[:2] / digest).write_bytes(content[:-4])
        two.hand_in(two.work(), seed=2)
        deadline = time.monotonic() + 30.0
        while rows(coordinator, "SELECT COUNT(*) FROM updates WHERE rejected IS NOT NULL") != [(1,)]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        one.hand_in(one.work(), seed=3)  # it is not locked out of this version
        settle(coordinator)
        assert check_versions(coordinator) == 1


def test_a_revoked_credential_is_refused(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator, member(coordinator) as device:
        coordinator.stop()
        with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
            database.execute("UPDATE devices SET standing = 'revoked'")
            database.commit()
        coordinator.start()
        with pytest.raises(Unauthorised, match="not known here"):
            device.work()
