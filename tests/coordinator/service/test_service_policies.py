"""The laws of the engine over HTTP, with a real coordinator: late devices, slots, and one update twice."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_sdk.core import messages
from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.errors import EdgeError, StaleUpdate
from edge_sdk.core.messages import Ask, Assignment, Heartbeat, HeartbeatReply, NotNow
from edge_sdk.core.records import to_json
from tests.coordinator.devices import SCALING, Device, configuration, member, random_adapter, update_of
from tests.processes import PATIENCE_S, CoordinatorProcess


@contextlib.contextmanager
def serving(
    folder: Path, policy: dict[str, object], *names: str
) -> Iterator[tuple[CoordinatorProcess, list[Device]]]:
    """A coordinator with some members."""
    with (
        CoordinatorProcess(folder, configuration(folder, policy)) as coordinator,
        contextlib.ExitStack() as members,
    ):
        yield coordinator, [members.enter_context(member(coordinator, name)) for name in names]


def rows(coordinator: CoordinatorProcess, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
        return database.execute(query).fetchall()


def beat(device: Device, work: Assignment, done: int = 10) -> HeartbeatReply:
    return device.transport.heartbeat(work.id, Heartbeat(done))


def post(coordinator: CoordinatorProcess, device: Device, route: str, record: object) -> httpx.Response:
    return httpx.post(
        coordinator.url + route,
        json=to_json(record),
        headers={"Authorization": f"Bearer {device.credential}"},
        timeout=PATIENCE_S,
    )


def together(count: int, do: Any) -> list[Any]:
    """What `do(0)`, `do(1)`, ... return when they begin at the same moment."""
    barrier, found = threading.Barrier(count), [None] * count

    def run(number: int) -> None:
        barrier.wait()
        found[number] = do(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return found


def test_a_late_device_is_told_to_finish_and_counts(tmp_path: Path) -> None:
    with serving(tmp_path, {"buffer_size": 1, "lease_s": 0.3}, "late") as (coordinator, (late,)):
        work = late.work()
        deadline = time.monotonic() + PATIENCE_S
        while beat(late, work).directive != "finish":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        late.hand_in(work)
        while late.status().version < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert rows(coordinator, "SELECT open FROM assignments") == [(0,)]


def test_retry_after_is_whole_seconds_and_no_less_than_the_record_says(tmp_path: Path) -> None:
    policy: dict[str, object] = {"concurrency": 1, "retry_s": 0.7}
    with serving(tmp_path, policy, "one", "two") as (coordinator, (one, two)):
        one.work()
        answer = post(coordinator, two, messages.ASSIGNMENTS, Ask(4))
        assert answer.status_code == 503
        exact = answer.json()["retry_after_s"]
        assert 0.7 <= exact <= 1.05
        assert int(answer.headers["Retry-After"]) >= exact
        assert "1 devices are at work" in answer.json()["reason"]


def test_a_slot_that_is_free_again_goes_to_who_waits(tmp_path: Path) -> None:
    policy: dict[str, object] = {"concurrency": 1, "buffer_size": 1}
    with serving(tmp_path, policy, "one", "two", "three") as (_, (one, two, three)):
        work = one.work()
        assert one.work().id == work.id  # its own again, which takes no other slot
        assert two.waits()
        assert three.waits()
        one.hand_in(work)
        assert three.waits()  # two waits longer
        second = two.work()
        assert one.waits()
        assert three.waits()
        two.hand_in(second, seed=1)
        assert isinstance(three.transport.ask(Ask(4)), Assignment)


def test_the_same_update_delivered_many_times_at_once_counts_once(tmp_path: Path) -> None:
    with serving(tmp_path, {"buffer_size": 1}, "one") as (coordinator, (one,)):
        work = one.work()
        content = encode(random_adapter(4, 1), SCALING)
        one.send(work, content)
        route = messages.UPDATE.format(id=work.id)
        answers = together(6, lambda _: post(coordinator, one, route, update_of(content, 4)))
        assert [answer.status_code for answer in answers] == [202] * 6, [answer.text for answer in answers]
        assert rows(coordinator, "SELECT assignment, rejected FROM updates") == [(work.id, None)]


def test_of_two_leases_of_a_device_the_newer_counts_and_the_other_is_told_why(tmp_path: Path) -> None:
    with serving(tmp_path, {"buffer_size": 4}, "one") as (coordinator, (one,)):
        works = [one.work(4), one.work(2)]
        contents = [encode(random_adapter(work.rank, seed), SCALING) for seed, work in enumerate(works)]
        for work, content in zip(works, contents, strict=True):
            one.send(work, content)

        def deliver(number: int) -> httpx.Response:
            record = update_of(contents[number], works[number].rank)
            return post(coordinator, one, messages.UPDATE.format(id=works[number].id), record)

        older, newer = together(2, deliver)
        assert [older.status_code, newer.status_code] == [409, 202]
        assert "newer work was granted to this device since" in older.json()["detail"]
        kept = rows(coordinator, "SELECT assignment FROM updates WHERE rejected IS NULL")
        assert kept == [(works[1].id,)]
        assert isinstance(one.transport.ask(Ask(4)), NotNow)


def test_a_lease_that_was_replaced_counts_no_more_after_a_restart_either(tmp_path: Path) -> None:
    with serving(tmp_path, {"buffer_size": 4}, "one") as (coordinator, (one,)):
        older, newer = one.work(4), one.work(2)
        coordinator.kill()
        coordinator.start()
        with pytest.raises(StaleUpdate, match="newer work was granted to this device since"):
            one.hand_in(older)
        assert one.transport.heartbeat(older.id, Heartbeat(3)).directive == "abandon"
        assert one.transport.heartbeat(newer.id, Heartbeat(3)).directive == "continue"
        one.hand_in(newer)


def test_asking_many_times_at_once_gives_one_assignment(tmp_path: Path) -> None:
    with serving(tmp_path, {}, "one") as (coordinator, (one,)):
        answers = together(6, lambda _: post(coordinator, one, messages.ASSIGNMENTS, Ask(4)))
        assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
        assert len({answer.json()["id"] for answer in answers}) == 1


def test_an_update_beyond_its_round_is_declined_or_has_its_reason_in_the_database(tmp_path: Path) -> None:
    """Four devices for a round of two hand in at the same moment: whichever way it goes, each hears of it."""
    policy: dict[str, object] = {"mode": "synchronous", "buffer_size": 2, "over_selection": 1.0}
    with serving(tmp_path, policy, "a", "b", "c", "d") as (coordinator, devices):
        works = [device.work() for device in devices]
        contents = [encode(random_adapter(4, seed), SCALING) for seed in range(4)]
        for device, work, content in zip(devices, works, contents, strict=True):
            device.send(work, content)

        def deliver(number: int) -> str:
            try:
                devices[number].transport.deliver(works[number].id, update_of(contents[number], 4))
            except EdgeError as error:
                assert isinstance(error, StaleUpdate), error
                return str(error)
            return ""

        said = together(4, deliver)
        deadline = time.monotonic() + PATIENCE_S
        while devices[0].status().version < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert sum(reason == "" for reason in said) == 2, said
        stored = dict(rows(coordinator, "SELECT assignment, COALESCE(rejected, '') FROM updates"))
        for work, reason in zip(works, said, strict=True):
            assert stored.get(work.id, reason) == reason
        merged = rows(coordinator, "SELECT COUNT(*) FROM updates WHERE merged_version = 1")
        assert merged == [(2,)]
