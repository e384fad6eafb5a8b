"""Policies by hand: over-selection, deadlines, finish now, bytes in flight, slots, restarts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Accept,
    Asked,
    Beat,
    BytesArrived,
    Decline,
    Expired,
    Grant,
    Lease,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Published,
    Refused,
    Restarted,
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import Ration, State
from edge_sdk.core.errors import InputError
from tests.coordinator.engine.effects import Said, merge, names, said, stored


def lease(effects: list[Said]) -> Lease:
    assert isinstance(effects[-1], Grant), effects
    return effects[-1].lease


def wait(effects: list[Said]) -> Wait:
    assert len(effects) == 1
    assert isinstance(effects[0], Wait), effects
    return effects[0]


def told(engine: Engine, device: str, id: str, done: int, now: float, version: int = 0) -> str:
    answer = said(engine, Beat(device, id, version, done), now)[-1]
    assert isinstance(answer, Tell)
    return answer.directive


# --- over-selection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "share", "places"),
    [(4, 0.0, 4), (4, 0.3, 6), (10, 0.3, 13), (3, 1.0, 6), (1, 0.01, 2), (10, 0.1, 11)],
)
def test_a_round_gives_work_to_k_devices_and_some_more_rounded_up(k: int, share: float, places: int) -> None:
    engine = Engine(Policy(mode="synchronous", buffer_size=k, over_selection=share))
    for number in range(places):
        lease(said(engine, Asked(f"d{number}", 4, f"a{number}"), 0.0))
    assert f"round 0 has its {places} devices" in wait(said(engine, Asked("more", 4, "b"), 0.0)).reason


def over_selected() -> Engine:
    """Three devices work for a round of two; the first two are in, and it is being merged."""
    engine = Engine(Policy(mode="synchronous", buffer_size=2, over_selection=0.5), steps=10)
    for device in "123":
        said(engine, Asked(device, 4, f"a{device}"), 0.0)
    said(engine, stored("a1", "1"), 5.0)
    assert names(merge(said(engine, stored("a2", "2"), 6.0))) == ["a1", "a2"]
    return engine


def test_once_k_are_in_the_others_are_told_to_abandon() -> None:
    engine = over_selected()
    assert told(engine, "3", "a3", 9, 7.0) == "abandon"
    assert not engine.state.training
    (answer,) = said(engine, Offered("3", "a3", 0), 8.0)
    assert isinstance(answer, Decline)
    assert "round 0 has all its updates and is being merged. Train from version 0" in str(answer.error)
    wait(said(engine, Asked("3", 4, "b3"), 9.0))
    said(engine, Merged(1, 4), 10.0)
    assert lease(said(engine, Asked("3", 4, "c3"), 12.0)).version == 1


def test_an_update_of_a_round_that_merges_is_declined_and_its_device_goes_on() -> None:
    """It was offered in time and stored too late: it is on disk, and must be left out of every version."""
    engine = over_selected()
    expired, answer = said(engine, stored("a3", "3"), 7.0)
    assert isinstance(expired, Expired)
    assert isinstance(answer, Decline)
    assert answer.update == "a3"
    said(engine, Merged(1, 4), 8.0)
    assert engine.state.buffer == []
    assert lease(said(engine, Asked("3", 4, "b3"), 9.0)).version == 1


def test_a_round_whose_merge_failed_takes_who_was_declined_meanwhile() -> None:
    engine = over_selected()
    told(engine, "3", "a3", 9, 7.0)
    said(engine, MergeFailed(), 8.0)
    assert said(engine, Offered("3", "a3", 0), 9.0) == [Accept()]


# --- deadlines ------------------------------------------------------------------------------------


def with_a_past(*took_s: float, **policy: Any) -> tuple[Engine, float]:
    """A device that took so long for assignments of 10 steps, each merged at once."""
    engine, now = Engine(Policy(buffer_size=1, **policy), steps=10), 0.0
    for version, seconds in enumerate(took_s):
        work = lease(said(engine, Asked("d", 4, f"a{version}"), now))
        now += seconds
        said(engine, Tick(), now)
        said(engine, stored(work.assignment, "d", version), now)
        said(engine, Merged(version + 1, 4), now)
    return engine, now


def test_a_deadline_follows_three_assignments_of_the_devices_own() -> None:
    for past, lease_s in (((30.0, 40.0), 600.0), ((30.0, 40.0, 60.0), 100.0)):
        engine, now = with_a_past(*past, deadline_mads=6.0)
        # Steps took 3, 4 and 6 s: the median is 4, its deviation 1; 10 steps of 4 + 6·1 s.
        work = lease(said(engine, Asked("d", 4, "next"), now))
        assert work.expires_at - now == pytest.approx(lease_s)
        other = lease(said(engine, Asked("new", 4, "b"), now))
        assert other.expires_at - now == 60.0  # nothing is known of it, not even that it works


def test_a_device_that_missed_its_deadline_gets_more_time_by_and_by() -> None:
    engine, now = with_a_past(*[20.0] * 3, *[100.0] * 5)
    work = lease(said(engine, Asked("d", 4, "next"), now))
    assert work.expires_at - now == pytest.approx(100.0 * 1.6)  # late updates were counted, and timed


def test_work_is_sized_to_what_a_device_does_in_the_time() -> None:
    engine, now = with_a_past(30.0, 40.0, 60.0, work_s=20.0)
    work = lease(said(engine, Asked("d", 4, "next"), now))
    assert work.steps == 5  # of 4 s each
    assert work.expires_at - now == pytest.approx(50.0)
    assert lease(said(engine, Asked("new", 4, "b"), now)).steps == 10


def test_partial_work_is_timed_by_the_steps_that_were_done() -> None:
    engine = Engine(Policy(buffer_size=1), steps=10)
    said(engine, Asked("d", 4, "a"), 0.0)
    event = stored("a", "d")
    said(engine, type(event)(event.update, steps=4), 20.0)
    assert engine.state.seats["d"].paces_s == (5.0,)


def test_a_device_remembers_its_newest_eight() -> None:
    engine, _ = with_a_past(*range(10, 200, 10))
    assert engine.state.seats["d"].paces_s == tuple(float(pace) for pace in range(12, 20))


# --- finish now -----------------------------------------------------------------------------------


def test_finish_when_the_time_is_over_without_a_quorum_and_half_is_done() -> None:
    engine = Engine(Policy(buffer_size=3, quorum=2, timeout_s=60.0), steps=10)
    for device in "12":
        said(engine, Asked(device, 4, f"a{device}"), 0.0)
    assert told(engine, "2", "a2", 9, 100.0) == "continue"  # nobody waits
    said(engine, stored("a1", "1"), 100.0)
    assert told(engine, "2", "a2", 9, 159.9) == "continue"
    assert told(engine, "2", "a2", 4, 160.0) == "continue"
    assert told(engine, "2", "a2", 5, 160.0) == "finish"
    assert names(merge(said(engine, stored("a2", "2"), 161.0))) == ["a1", "a2"]


def test_finish_when_one_version_more_makes_it_too_old() -> None:
    engine = Engine(Policy(max_staleness=2, lease_s=100.0), State(version=3), steps=10)
    said(
        engine,
        Restarted(version=3, leases=(Lease("a", "d", 1, 4, 100.0, steps=10), Lease("b", "e", 2, 4, 100.0))),
        0.0,
    )
    assert told(engine, "d", "a", 0, 1.0, version=1) == "finish"
    assert told(engine, "e", "b", 0, 1.0, version=2) == "continue"


def test_finish_to_late_work() -> None:
    engine = Engine(Policy(lease_s=20.0), steps=10)
    said(engine, Asked("d", 4, "a"), 0.0)
    assert told(engine, "d", "a", 1, 19.0) == "continue"
    said(engine, Tick(), 20.0)
    assert told(engine, "d", "a", 2, 21.0) == "finish"


def test_work_that_was_replaced_counts_no_more() -> None:
    engine = Engine(Policy())
    said(engine, Asked("d", 4, "a"), 0.0)
    said(engine, Asked("d", 2, "b"), 1.0)
    assert told(engine, "d", "a", 1, 2.0) == "abandon"
    (answer,) = said(engine, Offered("d", "a", 0), 2.0)
    assert isinstance(answer, Decline)
    assert "newer work was granted to this device since" in str(answer.error)
    assert answer.error.details == {"current_version": 0}
    assert told(engine, "d", "b", 1, 3.0) == "continue"
    said(engine, stored("b", "d"), 3.0)
    assert told(engine, "d", "a", 2, 4.0) == "abandon"


def test_work_in_no_hand_goes_on_while_no_other_was_granted() -> None:
    """Its device asked for other work, and was told to wait: what it has may count all the same."""
    engine = Engine(Policy(buffer_size=1, concurrency=1))
    said(engine, Asked("d", 4, "a"), 0.0)
    wait(said(engine, Asked("e", 4, "e1"), 0.5))
    assert isinstance(said(engine, Asked("d", 2, "b"), 1.0)[-1], Wait)
    assert told(engine, "d", "a", 1, 2.0) == "continue"
    assert names(merge(said(engine, stored("a", "d"), 3.0))) == ["a"]


# --- bytes in flight ------------------------------------------------------------------------------


def test_bytes_extend_a_lease_in_proportion() -> None:
    engine = Engine(Policy(lease_s=20.0))
    work = lease(said(engine, Asked("d", 4, "a"), 0.0))
    said(engine, BytesArrived("d", "a", 1024), 5.0)
    assert work.expires_at == 20.0  # 5 + 1: earlier than it is anyhow
    said(engine, BytesArrived("d", "a", 100 * 1024), 15.0)
    assert work.expires_at == 115.0
    assert said(engine, Tick(), 114.9) == []
    assert said(engine, Tick(), 115.0) == [Expired(work)]


def test_a_drip_of_single_bytes_does_not_hold_a_slot() -> None:
    engine, now = Engine(Policy(lease_s=20.0)), 0.0
    lease(said(engine, Asked("d", 4, "a"), 0.0))
    while not (effects := said(engine, Tick(), now)):
        said(engine, BytesArrived("d", "a", 1), now)
        now += 0.5
    assert isinstance(effects[0], Expired)
    assert now <= 20.5


def test_bytes_of_other_work_extend_nothing() -> None:
    engine = Engine(Policy(lease_s=20.0))
    work = lease(said(engine, Asked("d", 4, "a"), 0.0))
    said(engine, BytesArrived("d", "old", 10**9), 1.0)
    assert work.expires_at == 20.0
    said(engine, Tick(), 20.0)
    said(engine, BytesArrived("d", "a", 10**9), 21.0)  # late: the slot is gone, the update may come
    assert not engine.state.training


# --- slots ----------------------------------------------------------------------------------------


def test_no_more_leases_than_the_host_wants() -> None:
    engine = Engine(Policy(buffer_size=1, concurrency=2, lease_s=20.0))
    for device in "12":
        lease(said(engine, Asked(device, 4, f"a{device}"), 0.0))
    answer = wait(said(engine, Asked("3", 4, "a3"), 0.0))
    assert "2 devices are at work, as many as the host wants; you are in line" in answer.reason
    lease(said(engine, Asked("1", 4, "again"), 1.0))  # the same work: no further slot
    said(engine, Refused("1", "a1"), 2.0)
    assert lease(said(engine, Asked("3", 4, "b3"), 3.0)).device == "3"
    assert engine.state.training == {"2", "3"}


def test_two_offers_of_one_device_at_once_count_once() -> None:
    """Old work and its replacement from one version are checked side by side; the old is stored first."""
    engine = Engine(Policy(buffer_size=5))
    said(engine, Asked("d", 4, "a"), 0.0)
    assert said(engine, Offered("d", "a", 0), 1.0) == [Accept()]
    said(engine, Asked("d", 2, "b"), 1.0)
    assert said(engine, Offered("d", "b", 0), 2.0) == [Accept()]
    (answer,) = said(engine, stored("a", "d"), 3.0)
    assert isinstance(answer, Decline)
    assert "newer work was granted" in str(answer.error)
    assert said(engine, stored("b", "d"), 3.0) == []
    assert [update.update for update in engine.state.buffer] == ["b"]


def test_two_updates_from_one_version_count_once() -> None:
    """Of work from before a start that lost the rows of its leases."""
    engine = Engine(Policy(buffer_size=5))
    said(engine, stored("a", "d"), 3.0)
    (answer,) = said(engine, stored("b", "d"), 3.0)
    assert isinstance(answer, Decline)
    assert "this device handed in other work" in str(answer.error)
    assert [update.update for update in engine.state.buffer] == ["a"]


# --- privacy --------------------------------------------------------------------------------------


def test_a_spent_budget_ends_a_grant() -> None:
    """The host has lowered it, and started again."""
    engine = Engine(Policy(buffer_size=2, lease_s=20.0), State(version=1), Ration(1, left={"d": 0}))
    said(engine, Restarted(version=1, leases=(Lease("a", "d", 1, 4, 20.0),)), 0.0)
    expired, answer = said(engine, Asked("d", 4, "b"), 2.0)  # the same work would be declined again
    assert isinstance(expired, Expired)
    assert isinstance(answer, Wait)
    assert "privacy budget is spent" in answer.reason


def test_of_two_updates_at_once_the_one_beyond_the_budget_is_left_out_and_awaited_by_nobody() -> None:
    engine = Engine(Policy(buffer_size=1, timeout_s=60.0), State(version=1), Ration(1))
    for id, version in (("a", 0), ("b", 1)):
        assert said(engine, Offered("d", id, version), 0.0) == [Accept()]
    merge(said(engine, stored("a", "d", 0), 1.0))
    (answer,) = said(engine, stored("b", "d", 1), 1.0)
    assert isinstance(answer, Decline)
    said(engine, Merged(2, 4), 2.0)
    assert engine.state.buffer == []
    said(engine, Asked("other", 4, "c"), 100.0)
    assert told(engine, "other", "c", 1, 101.0, version=2) == "continue"


# --- restarts and clocks --------------------------------------------------------------------------


def test_a_restart_takes_up_leases_paces_and_buffer() -> None:
    engine = Engine(Policy(buffer_size=3, quorum=1, timeout_s=60.0), steps=10)
    kept = Lease("a", "d", 2, 4, expires_at=130.0, steps=10)
    begun = Restarted(
        version=2,
        rank=6,
        leases=(kept,),
        buffer=(stored("x", "e", 1).update,),
        contributed=(("e", 1),),
        paces_s=(("d", tuple(float(pace) for pace in range(20))), ("e", (1.0, 1.0, 1.0))),
    )
    assert said(engine, begun, 100.0) == []
    assert lease(said(engine, Asked("d", 4, "new"), 101.0)) == kept
    assert engine.state.seats["d"].paces_s == tuple(float(pace) for pace in range(12, 20))
    work = lease(said(engine, Asked("e", 4, "b", carry_rank=9), 102.0))
    assert (work.version, work.carry_rank) == (2, 6)
    assert work.expires_at == pytest.approx(102.0 + 16.0)  # 10 steps of 1 + 6·0.1 s
    assert said(engine, Tick(), 129.9) == [Expired(work)]
    due = said(engine, Tick(), 160.0)  # a minute after the start
    assert due[0] == Expired(kept)
    assert isinstance(due[1], Merge)
    assert due[1].version == 3


def test_after_a_restart_nothing_counts_twice() -> None:
    engine = Engine(Policy())
    said(engine, Restarted(version=2, contributed=(("d", 1),)), 0.0)
    for version, word in ((1, Decline), (2, Accept)):
        assert isinstance(said(engine, Offered("d", f"a{version}", version), 1.0)[-1], word)


def test_a_stored_update_of_a_round_that_is_over_is_declined_at_the_start() -> None:
    engine = Engine(Policy(mode="synchronous", buffer_size=2))
    before, now = stored("old", "d", 0).update, stored("new", "e", 1).update
    (answer,) = said(engine, Restarted(version=1, buffer=(before, now)), 0.0)
    assert isinstance(answer, Decline)
    assert answer.update == "old"
    assert engine.state.buffer == [now]


def test_a_clock_that_begins_at_zero_surprises_nobody() -> None:
    engine = Engine(Policy(buffer_size=2, quorum=1, timeout_s=10.0, lease_s=20.0, retry_s=2.0), steps=5)
    said(engine, Restarted(), 0.0)
    assert said(engine, Tick(), 0.0) == []
    assert lease(said(engine, Asked("d", 4, "a"), 0.0)).expires_at == 20.0
    said(engine, stored("a", "d"), 0.0)
    assert engine.state.first_at == 0.0
    assert 2.0 <= wait(said(engine, Asked("d", 4, "b"), 0.0)).retry_after_s <= 3.0
    assert said(engine, Tick(), 9.9) == []
    merge(said(engine, Tick(), 10.0))
    said(engine, MergeFailed(), 10.0)
    merge(said(engine, Tick(), 20.0))
    assert said(engine, Merged(1, 4), 20.0) == [Published(1)]
    assert engine.state.seats["d"].paces_s == (0.0,)


# --- what a host may choose -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan])
@pytest.mark.parametrize(
    "key",
    [
        *("buffer_size", "quorum", "timeout_s", "concurrency", "server_learning_rate"),
        *("lease_s", "deadline_mads", "work_s", "retry_s", "max_examples"),
    ],
)
def test_what_must_be_above_zero_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"policy\.{key} is {value}; it must be above 0"):
        Policy(**{key: value})


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"quorum": 5}, "policy.quorum is 5, above policy.buffer_size 4"),
        ({"max_staleness": -1}, "policy.max_staleness is -1; it must be 0 or more"),
        (
            {"max_staleness": 9},
            "max_staleness is 9, but .*lease_s of 600 s, 10 versions .*timeout_s of 60 s",
        ),
        ({"over_selection": 0.3}, "policy.over_selection is for synchronous rounds"),
        (
            {"mode": "synchronous", "over_selection": -0.1},
            "policy.over_selection is -0.1; it must be 0 or more",
        ),
        ({"mode": "synchronous", "over_selection": math.nan}, "policy.over_selection is nan"),
        ({"mode": "synchronous", "over_selection": math.inf}, "policy.over_selection is inf"),
        ({"mode": "synchronous", "concurrency": 3}, "concurrency is 3, but a round gives work to 4 devices"),
        (
            {"mode": "synchronous", "concurrency": 5, "over_selection": 0.3},
            "concurrency is 5, but a round gives work to 6 devices",
        ),
    ],
)
def test_choices_that_do_not_fit_each_other_are_refused(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Policy(**choice)


def test_a_device_that_keeps_its_deadline_is_never_too_old_by_time_outs() -> None:
    assert Policy().staleness_limit == 10
    assert Policy(timeout_s=10.0).staleness_limit == 60
    assert Policy(max_staleness=10).staleness_limit == 10
    assert Policy(mode="synchronous", max_staleness=3).staleness_limit == 0
