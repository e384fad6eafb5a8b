"""Slots in turn, and devices that come back apart."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.engine.engine import Engine
from coordinator.engine.events import Asked, Grant, Lease, Merge, Merged, Tick, Wait
from coordinator.engine.policy import Policy
from coordinator.engine.waiting_line import ABSENCE_S, JITTER, MOST_ASKS_S, MOST_RETRY_S, WaitingLine
from tests.coordinator.engine.effects import said, stored

# --- turns ----------------------------------------------------------------------------------------


def test_a_slot_is_for_who_came_first() -> None:
    line = WaitingLine()
    for device in "abc":
        line.wait_for_slot(device, 1, 2.0, device, 0.0)
    assert not line.has_turn("a", 0, 1.0)
    assert [line.has_turn(device, 1, 1.0) for device in "abc"] == [True, False, False]
    assert [line.has_turn(device, 2, 1.0) for device in "abc"] == [True, True, False]
    assert not line.has_turn("new", 3, 1.0)
    assert line.has_turn("new", 4, 1.0)
    line.leave("a")
    assert [line.has_turn(device, 1, 1.0) for device in "bc"] == [True, False]


def test_asking_again_keeps_the_place() -> None:
    line = WaitingLine()
    for device in ("a", "b", "a", "a"):
        line.wait_for_slot(device, 1, 2.0, device, 0.0)
    assert line.has_turn("a", 1, 1.0)
    assert not line.has_turn("b", 1, 1.0)


def test_who_is_gone_loses_the_place_and_holds_nobody_up() -> None:
    line = WaitingLine()
    gone_s = line.wait_for_slot("gone", 1, 2.0, "x", 0.0)
    absent_at = 1.5 * gone_s + ABSENCE_S
    line.wait_for_slot("here", 1, 2.0, "y", 0.0)
    assert not line.has_turn("here", 1, absent_at - 0.1)
    assert line.has_turn("here", 1, absent_at + 0.1)
    line.wait_for_slot("here", 1, 2.0, "y", absent_at + 0.1)
    assert not line.has_turn("gone", 1, absent_at + 0.2)  # back, at the end of the line


def test_a_device_that_was_told_to_wait_long_ago_gets_a_place_at_once() -> None:
    line = WaitingLine()
    line.wait("late", 2.0, "x", 0.0)  # for another reason
    line.wait_for_slot("late", 1, 2.0, "x", 1000.0)
    line.wait_for_slot("next", 1, 2.0, "y", 1001.0)
    assert line.has_turn("late", 1, 1002.0)
    assert not line.has_turn("next", 1, 1002.0)


def test_who_is_far_behind_is_asked_back_later() -> None:
    line = WaitingLine()
    told = [line.wait_for_slot(str(n), 10, 2.0, "same", 0.0) for n in range(101)]
    unjittered = [seconds / told[0] * 2.0 for seconds in told]
    assert unjittered[:3] == pytest.approx([2.0, 2.2, 2.4])
    assert unjittered[100] == pytest.approx(2.0 * (1 + 100 / 10))


def test_who_could_not_use_a_slot_keeps_no_place() -> None:
    """b lines up, then its late update comes in: it waits for the version, which needs c's update."""
    engine = Engine(Policy(buffer_size=2, quorum=2, concurrency=1, lease_s=20.0))
    said(engine, Asked("b", 4, "b1"), 0.0)
    said(engine, Tick(), 20.0)
    said(engine, Asked("a", 4, "a1"), 21.0)
    assert isinstance(said(engine, Asked("b", 4, "b2"), 22.0)[-1], Wait)
    said(engine, stored("b1", "b"), 23.0)
    said(engine, Tick(), 41.0)  # a is gone
    assert isinstance(said(engine, Asked("b", 4, "b3"), 42.0)[-1], Wait)
    assert isinstance(said(engine, Asked("c", 4, "c1"), 42.0)[-1], Grant)


def test_a_fast_device_does_not_take_every_synchronous_round() -> None:
    engine = Engine(Policy(mode="synchronous", buffer_size=1))
    for version in range(10):
        answer = said(engine, Asked("fast", 4, f"f{version}"), float(version))[-1]
        if isinstance(answer, Wait):
            break
        said(engine, Asked("slow", 4, f"s{version}"), version + 0.1)
        said(engine, stored(f"f{version}", "fast", version), version + 0.2)
        said(engine, Merged(version + 1, 4), version + 0.3)
    assert version == 1
    assert isinstance(said(engine, Asked("slow", 4, "s"), 3.0)[-1], Grant)


def take_turns(slots: int, work_s: list[float]) -> Counter[int]:
    """How many slots each device got, with devices that come back when they are told to.

    Who stands in line and is overtaken twice by the same device must have a slot kept for it.
    """
    engine = Engine(
        Policy(buffer_size=1, concurrency=slots, lease_s=1e6, first_lease_s=1e6, least_version_s=0.0)
    )
    wakes: list[tuple[float, int, Lease | None]] = [(0.0, device, None) for device in range(len(work_s))]
    overtaken: dict[int, Counter[int]] = {}  # who stands in line, and who got slots since
    turns: Counter[int] = Counter()
    for number in range(80 * len(work_s)):
        now, device, lease = heapq.heappop(wakes)
        if lease is not None:
            effects = said(engine, stored(lease.assignment, str(device), lease.version), now)
            assert isinstance(effects[-1], Merge)
            said(engine, Merged(engine.state.version + 1, 4), now)
        answer = said(engine, Asked(str(device), 4, f"a{number}"), now)[-1]
        if isinstance(answer, Wait):
            assert "in line" in answer.reason
            overtaken.setdefault(device, Counter())
            heapq.heappush(wakes, (now + answer.retry_after_s, device, None))
            continue
        assert isinstance(answer, Grant)
        overtaken.pop(device, None)
        for others in overtaken.values():
            others[device] += 1
        twice = sum(others[device] > 1 for others in overtaken.values())
        assert len(engine.state.training) + twice <= slots
        turns[device] += 1
        heapq.heappush(wakes, (now + work_s[device], device, answer.lease))
    return turns


@settings(max_examples=40)
@given(slots=st.integers(1, 4), work_s=st.lists(st.floats(0.1, 40.0), min_size=5, max_size=9))
def test_no_device_gets_two_slots_past_another_but_where_one_is_kept(slots: int, work_s: list[float]) -> None:
    """The law of turns, whatever the speeds; with one slot nobody gets two past anybody."""
    turns = take_turns(slots, work_s)
    assert set(turns) == set(range(len(work_s)))


def test_with_one_slot_all_get_as_many_turns() -> None:
    turns = take_turns(1, [0.1, 1.0, 5.0, 20.0, 40.0])
    assert max(turns.values()) - min(turns.values()) <= 1


# --- coming back ----------------------------------------------------------------------------------


@given(seed=st.text(max_size=30), at_least=st.floats(0.01, 300.0))
def test_jitter_is_from_the_seed_and_at_most_half(seed: str, at_least: float) -> None:
    told = [WaitingLine().wait("d", at_least, seed, 0.0) for _ in range(2)]
    assert told[0] == told[1]
    assert at_least <= told[0] <= at_least * (1 + JITTER)


def test_jitters_of_different_seeds_fill_the_range_evenly() -> None:
    draw = random.Random(1)
    shares = [WaitingLine().wait("d", 1.0, draw.randbytes(12).hex(), 0.0) - 1.0 for _ in range(2000)]
    for tenth in range(10):
        share = sum(tenth * JITTER / 10 <= s < (tenth + 1) * JITTER / 10 for s in shares) / len(shares)
        assert 0.07 < share < 0.13


def test_ten_thousand_devices_told_at_once_come_back_apart() -> None:
    """All at 0, then each when told, for ten minutes: about as many a second as are meant to."""
    line, devices = WaitingLine(), 10_000
    wakes = [(0.0, device) for device in range(devices)]
    seconds: Counter[int] = Counter()
    while wakes[0][0] < 600.0:
        now, device = heapq.heappop(wakes)
        seconds[int(now)] += 1
        retry_s = line.wait(str(device), 2.0, f"{device} at {now}", now)
        assert 2.0 <= retry_s <= MOST_RETRY_S * (1 + JITTER)
        heapq.heappush(wakes, (now + retry_s, device))
    later = [seconds[second] for second in range(1, 600)]
    assert max(later) <= 3 * MOST_ASKS_S  # never all at once again
    settled = later[300:]
    assert 0.6 * MOST_ASKS_S < sum(settled) / len(settled) < 1.05 * MOST_ASKS_S
    assert max(settled) < 1.6 * MOST_ASKS_S
    assert len(line.back_by) == devices
    assert not line.tickets


def test_few_devices_are_told_the_hosts_own_time() -> None:
    line = WaitingLine()
    told = [line.wait(str(n), 2.0, str(n), 0.0) for n in range(100)]
    assert all(2.0 <= retry_s <= 3.0 for retry_s in told)


def test_devices_that_never_come_back_are_forgotten() -> None:
    line = WaitingLine()
    for n in range(5000):
        line.wait(f"gone {n}", 2.0, str(n), 0.0)
    assert line.wait("first", 2.0, "x", 1000.0) <= 3.0  # nobody is slowed down by them
    assert set(line.back_by) == {"first"}


@given(told=st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.floats(0.0, 30.0)), max_size=60))
def test_the_line_holds_no_more_than_the_devices_that_there_are(told: list[tuple[int, bool, float]]) -> None:
    line, now = WaitingLine(), 0.0
    for device, in_line, seconds in told:
        now += seconds
        if in_line:
            line.wait_for_slot(str(device), 2, 2.0, "s", now)
            assert str(device) in line.tickets
        else:
            line.wait(str(device), 2.0, "s", now)
        assert set(line.tickets) <= set(line.back_by)
        assert len(line.back_by) <= 6
        assert all(first < second for first, second in pairwise(line.tickets.values()))
