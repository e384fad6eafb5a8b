"""The parts of the host's limits: buckets, room on the disk, and numbers that contradict each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.limits import bucket
from coordinator.limits.allowances import Allowances
from coordinator.limits.bucket import Buckets
from coordinator.limits.free_disk import FreeDisk
from coordinator.limits.limits import Limits
from coordinator.settings import load_settings
from edge_sdk.core.errors import DiskFull, EdgeError, FederationFull, InputError, TooLarge, TooOften


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- buckets --------------------------------------------------------------------------------------


def test_so_much_at_once_and_then_so_much_a_second() -> None:
    clock = Clock()
    buckets = Buckets(3, 2.0, clock)
    assert [buckets.take("a") for _ in range(3)] == [0.0] * 3
    assert buckets.take("a") == 0.5
    assert buckets.take("b") == 0.0  # another key
    clock.now = 0.5
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == 0.5


@given(st.lists(st.floats(0.0, 5.0), max_size=60))
def test_never_more_than_the_most_and_what_flowed_in(pauses: list[float]) -> None:
    clock, taken = Clock(), 0
    buckets = Buckets(4, 1.5, clock)
    for pause in pauses:
        clock.now += pause
        taken += buckets.take("a") == 0.0
    assert taken <= 4 + 1.5 * clock.now + 1e-6


def test_what_was_used_already_is_paid_off_before_there_is_more() -> None:
    clock = Clock()
    buckets = Buckets(4, 1.0, clock)
    buckets.charge("a", 6)
    assert buckets.wait_s("a") == 2.0
    clock.now = 2.5
    assert buckets.wait_s("a") == 0.0
    buckets.charge("a", 1e9)
    assert buckets.wait_s("a") == 4.0  # no debt is larger than a bucket
    buckets.fill("a")
    assert buckets.wait_s("a") == 0.0


def test_keys_without_end_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "KEPT", 10)
    buckets = Buckets(1, 1.0, Clock())
    for number in range(100):
        assert buckets.take(str(number)) == 0.0
    assert buckets.take("99") > 0.0
    assert buckets.take("0") == 0.0


# --- what may still be asked for ------------------------------------------------------------------


def joined(allowances: Allowances, network: str = "a", devices: int = 0, profile_bytes: int = 2) -> bool:
    try:
        allowances.join(network, devices, profile_bytes)
    except TooOften:
        return False
    return True


def test_an_address_that_joins_too_often_leaves_room_for_others() -> None:
    clock = Clock()
    allowances = Allowances(Limits(joins_minute=10, joins_minute_of_address=6), 5.0, clock)
    assert [joined(allowances) for _ in range(20)] == [True] * 6 + [False] * 14
    assert [joined(allowances, "b") for _ in range(5)] == [True] * 4 + [False]
    clock.now = 60.0
    assert [joined(allowances) for _ in range(7)] == [True] * 6 + [False]


@pytest.mark.parametrize(
    ("devices", "profile_bytes", "kind"), [(3, 4096, FederationFull), (2, 4097, TooLarge), (2, 4096, None)]
)
def test_the_edges_of_what_may_join(devices: int, profile_bytes: int, kind: type[EdgeError] | None) -> None:
    allowances = Allowances(Limits(devices=3), 5.0, Clock())
    if kind is None:
        return allowances.join("a", devices, profile_bytes)
    with pytest.raises(kind):
        allowances.join("a", devices, profile_bytes)
    return None


def test_requests_of_a_device() -> None:
    clock = Clock()
    allowances = Allowances(Limits(requests_s=2.0), 5.0, clock)
    for _ in range(20):
        allowances.request("a")
    with pytest.raises(TooOften) as told:
        allowances.request("a")
    assert told.value.details["retry_after_s"] == pytest.approx(0.5)
    allowances.request("b")
    clock.now = 0.5
    allowances.request("a")


def test_a_federation_of_many_heartbeats_allows_as_many() -> None:
    assert Limits().requests_with(5.0) == 20.0
    assert Limits().requests_with(0.1) == 40.0
    assert Limits(requests_s=1.0).requests_with(5.0) == 1.0


def test_uploads_that_nothing_came_of() -> None:
    clock = Clock()
    allowances = Allowances(Limits(wasted_uploads_hour=2), 5.0, clock)
    for _ in range(2):
        allowances.require_useful("a")
        allowances.uploaded("a", 1.0, begins=False)
    with pytest.raises(TooOften):
        allowances.require_useful("a")
    allowances.require_useful("b")
    allowances.handed_in("a")
    allowances.require_useful("a")


# --- the disk -------------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    free: int


def test_room_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = Usage(10_000, 1100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    disk = FreeDisk(tmp_path, 1000)
    disk.take(100)
    with pytest.raises(DiskFull, match="kept for merges"):
        disk.take(1)
    disk.take()
    usage = Usage(10_000, 999)
    disk.look()
    with pytest.raises(DiskFull):
        disk.take()


@pytest.mark.parametrize(("total", "kept"), [(1000, 50), (1 << 40, 1 << 30)])
def test_where_the_host_names_none_a_share_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, kept: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(total, total))
    assert FreeDisk(tmp_path).least_bytes == kept


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "joins_minute = 5\njoins_minute_of_address = 6",
            ("limits.joins_minute_of_address", "limits.joins_minute"),
        ),
        (
            "connections = 5\nconnections_of_address = 6",
            ("limits.connections_of_address", "limits.connections"),
        ),
        ("devices = 3", ("limits.devices", "policy.buffer_size")),
        ("requests_s = 0.1", ("limits.requests_s", "federation.heartbeat_s")),
        ("devices = 0", ("limits.devices",)),
        ("status_devices = 1001", ("limits.status_devices",)),
        ("answer_s = 0", ("limits.answer_s",)),
        ("join_minute = 5", ("limits.join_minute", "did you mean 'limits.joins_minute'")),
    ],
)
def test_what_contradicts_is_refused_by_name(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(f"[limits]\n{text}\n")
    with pytest.raises(InputError) as error:
        load_settings(file)
    assert all(name in str(error.value) for name in names), error.value
    assert str(file) in str(error.value)


def test_the_defaults_are_for_ten_thousand_devices_behind_one_address() -> None:
    limits = Limits()
    assert limits.devices >= 10_000
    most, of_address = limits.connections_within(16384)
    assert 10_000 <= of_address < most < 16384
    assert limits.joins_minute_of_address * 60 >= 10_000  # within an hour


@pytest.mark.parametrize("files", [16, 64, 1024, 16384, None])
def test_there_are_always_files_left(files: int | None) -> None:
    most, of_address = Limits().connections_within(files)
    assert 1 <= of_address <= most
    assert files is None or most <= files - min(1024, files // 2)


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        make()
    return str(error.value)


def test_more_connections_than_files_are_refused() -> None:
    assert "ulimit" in refused(lambda: Limits(connections=1000).connections_within(1024))
    assert Limits(connections=512).connections_within(1024)[0] == 512
    text = refused(lambda: Limits(connections_of_address=600).connections_within(1024))
    assert "limits.connections_of_address is 600" in text
