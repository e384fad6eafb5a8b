"""Whose time counts: leases that are replaced or come to nothing, and how fast versions may come."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Asked,
    Beat,
    BytesArrived,
    Decline,
    Expired,
    Grant,
    Lease,
    Merged,
    Offered,
    Refused,
    Restarted,
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import State
from coordinator.engine.tempo import Tempo
from edge_sdk.core.errors import InputError
from tests.coordinator.engine.effects import Said, merge, names, said, stored
from tests.coordinator.engine.virtual_federation import BEAT_S, MERGE_S, TICK_S, VirtualFederation

HONEST = ("h1", "h2", "h3")
ZEROS = ("z1", "z2", "z3", "z4")
HOUR_S = 3600.0


def lease(effects: list[Said]) -> Lease:
    assert isinstance(effects[-1], Grant), effects
    return effects[-1].lease


def wait(effects: list[Said]) -> Wait:
    assert isinstance(effects[-1], Wait), effects
    return effects[-1]


def told(engine: Engine, device: str, id: str, done: int, now: float) -> str:
    answer = said(engine, Beat(device, id, 0, done), now)[-1]
    assert isinstance(answer, Tell)
    return answer.directive


# --- versions leave honest devices their time -----------------------------------------------------


def beside_zeros(seconds: float, **policy: Any) -> VirtualFederation:
    """Three devices that need a minute, beside four that hand in zeros at once."""
    world = VirtualFederation(Policy(buffer_size=4, **policy))
    for device in ZEROS:
        world.live(world.instant(device))
    for number, device in enumerate(HONEST):
        world.live(world.honest(device, 60.0), 0.7 * number)
    world.run(seconds)
    return world


def test_beside_devices_that_hand_in_at_once_all_honest_work_is_merged() -> None:
    world = beside_zeros(1200.0)
    for device in HONEST:
        assert world.merged(device) >= 17  # 60 s each, and a wait for the next version
        assert world.counts[device, "abandoned"] == world.counts[device, "declined"] == 0
        assert world.counts[device, "handed in in part"] <= 1  # the first, when zeros alone set the pace
    gaps = [
        after - before for (before, _), (after, _) in zip(world.published, world.published[1:], strict=False)
    ]
    assert min(gaps[5:]) >= 60.0 / 10


def test_without_a_least_time_none_of_it_is() -> None:
    """What the test above is about."""
    world = beside_zeros(600.0, least_version_s=0.0)
    assert len(world.published) > 600
    for device in HONEST:
        assert world.merged(device) == 0
        assert world.counts[device, "abandoned"] >= 3


def test_a_fixed_least_time_is_kept() -> None:
    world = beside_zeros(600.0, least_version_s=30.0)
    assert 18 <= len(world.published) <= 20


def test_a_fast_federation_is_as_fast_as_without_it() -> None:
    published, merged = [], []
    for least_version_s in (None, 0.0):
        world = VirtualFederation(Policy(buffer_size=3, least_version_s=least_version_s))
        for number in range(8):
            world.live(world.honest(f"d{number}", 1.0 + 0.1 * number), 0.3 * number)
        world.run(300.0)
        published.append(len(world.published))
        merged.append(sum(len(devices) for _, devices in world.published))
    assert merged[0] >= 0.97 * merged[1] > 1000
    assert published[0] >= 0.85 * published[1]  # those that would come together wait for a tick


def paced_by(liars: int, honest: int) -> VirtualFederation:
    world = VirtualFederation(Policy(buffer_size=2))
    for number in range(liars):
        world.live(world.liar(f"l{number}"))
    for number in range(honest):
        world.live(world.honest(f"d{number}", 5.0), 1.0 * number)
    world.run(1800.0)
    return world


def test_devices_that_pretend_to_be_slow_set_no_pace_while_they_are_a_quarter() -> None:
    free, beside = paced_by(0, 6), paced_by(2, 6)
    assert len(beside.published) >= 0.9 * len(free.published)


def test_any_number_of_them_cannot_keep_a_version_longer_than_the_time_out() -> None:
    world = paced_by(12, 6)
    gaps = [
        after - before for (before, _), (after, _) in zip(world.published, world.published[1:], strict=False)
    ]
    assert max(gaps) <= Policy().timeout_s + BEAT_S + MERGE_S + TICK_S


def test_the_least_time_is_a_share_of_what_three_quarters_take() -> None:
    tempo, policy = Tempo(), Policy(timeout_s=60.0, lease_s=600.0)
    assert policy.staleness_limit == 10
    for number, seconds in enumerate((1.0, 2.0, 90.0, 180.0)):
        tempo.note(str(number), seconds, 0.0)
    assert tempo.least_version_s(policy, 1.0) == pytest.approx(90.0 / 9)
    tempo.note("3", 0.5, 1.0)  # it has become quick
    assert tempo.least_version_s(policy, 1.0) == pytest.approx(2.0 / 9)
    for number in range(4):
        tempo.note(str(number), 599.0, 2.0)
    assert tempo.least_version_s(policy, 2.0) == 60.0  # never more than the time-out
    assert tempo.least_version_s(Policy(mode="synchronous"), 2.0) == 0.0
    assert tempo.least_version_s(policy, 603.0) == 0.0  # of devices that were not heard of since
    assert tempo.ordered == []


@given(
    notes=st.lists(
        st.tuples(
            st.sampled_from("abcdefg"), st.sampled_from([0.0, 1.0, 2.5, 60.0, 300.0]), st.floats(0.0, 400.0)
        ),
        max_size=40,
    )
)
def test_what_most_take_is_kept_in_order_whatever_comes(notes: list[tuple[str, float, float]]) -> None:
    tempo, policy, now = Tempo(), Policy(timeout_s=1e9, max_staleness=2, lease_s=600.0), 0.0
    known: dict[str, tuple[float, float]] = {}
    for device, seconds, later_s in notes:
        now += later_s
        tempo.note(device, seconds, now)
        known[device] = seconds, now
        active = sorted(seconds for seconds, at in known.values() if at >= now - 600.0)
        assert tempo.least_version_s(policy, now) == active[math.ceil(0.75 * len(active)) - 1]
        assert tempo.ordered == active
        assert set(tempo.taken) <= set(known)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_least_time_that_cannot_be_is_refused_by_name(value: float) -> None:
    with pytest.raises(InputError, match=rf"policy\.least_version_s is {value}; it must be 0 or more"):
        Policy(least_version_s=value)


def test_rounds_have_no_least_time() -> None:
    with pytest.raises(InputError, match="least_version_s is for buffers"):
        Policy(mode="synchronous", least_version_s=5.0)


# --- one update of a device in a version ----------------------------------------------------------


def test_leases_hoarded_at_two_ranks_in_turn_give_one_update() -> None:
    """Leases of one version in turn made a version of three updates of one device."""
    engine = Engine(Policy(buffer_size=3, timeout_s=60.0))
    ids = [
        lease(said(engine, Asked("d", rank, f"a{number}"), 0.1 * number)).assignment
        for number, rank in enumerate((2, 4))
    ]
    assert "nothing came of your last work" in wait(said(engine, Asked("d", 2, "a2"), 0.5)).reason
    answers = [said(engine, Offered("d", id, 0), 1.0)[-1] for id in ids]
    assert [isinstance(answer, Decline) for answer in answers] == [True, False]
    assert said(engine, stored(ids[1], "d"), 2.0) == []
    assert "version 0 is in" in wait(said(engine, Asked("d", 2, "more"), 3.0)).reason
    for number, device in enumerate("ef"):
        assert engine.state.phase == "collecting"
        effects = said(engine, stored(f"x{number}", device), 4.0)
    assert names(merge(effects)) == ["a1", "x0", "x1"]


def test_work_beside_a_late_update_in_the_buffer_is_for_the_version_after() -> None:
    """It need not wait, but does not count twice in one version. What is then left over is waited for."""
    engine = Engine(Policy(buffer_size=2, least_version_s=0.0), State(version=1))
    said(engine, Restarted(version=1, leases=(Lease("late", "d", 0, 4, 10.0),), newest=(("d", "late"),)), 0.0)
    said(engine, stored("late", "d", 0), 1.0)
    work = lease(said(engine, Asked("d", 4, "now"), 2.0))
    assert said(engine, stored(work.assignment, "d", 1), 3.0) == []
    assert names(merge(said(engine, stored("x", "e", 1), 4.0))) == ["late", "x"]
    said(engine, Merged(2, 4), 5.0)
    assert "one of each device" in wait(said(engine, Asked("d", 4, "more"), 5.5)).reason
    assert names(merge(said(engine, stored("y", "e", 2), 6.0))) == ["now", "y"]
    said(engine, Merged(3, 4), 7.0)
    lease(said(engine, Asked("d", 4, "more"), 8.0))


def test_over_versions_too_hoarded_leases_are_worth_one_each() -> None:
    engine = Engine(Policy(buffer_size=1, least_version_s=0.0))
    hoard = []
    for version in range(2):
        hoard.append(
            lease(said(engine, Asked("d", 2 + 2 * (version % 2), f"d{version}"), version)).assignment
        )
        merge(said(engine, stored(f"x{version}", "e", version), version))
        said(engine, Merged(version + 1, 4), version)
    for version, id in enumerate(hoard):
        answer = said(engine, Offered("d", id, version), 4.0)[-1]
        assert isinstance(answer, Decline) == (version < 1)


def test_what_was_granted_last_is_known_after_a_restart() -> None:
    engine = Engine(Policy())
    said(engine, Restarted(version=3, newest=(("d", "new"),), contributed=(("d", 1),)), 0.0)
    assert isinstance(said(engine, Offered("d", "old", 2), 1.0)[-1], Decline)
    assert told(engine, "d", "old", 1, 1.0) == "abandon"
    assert not isinstance(said(engine, Offered("d", "new", 3), 1.0)[-1], Decline)


def test_an_expired_lease_that_nothing_followed_still_counts() -> None:
    engine = Engine(Policy(buffer_size=1, lease_s=20.0))
    said(engine, Asked("d", 4, "a"), 0.0)
    said(engine, Tick(), 20.0)
    wait(said(engine, Asked("d", 4, "b"), 21.0))  # it pauses, and nothing was granted
    assert names(merge(said(engine, stored("a", "d"), 22.0))) == ["a"]


# --- first leases ---------------------------------------------------------------------------------


def test_a_first_lease_is_short_and_later_ones_are_not() -> None:
    engine = Engine(Policy(buffer_size=1, lease_s=600.0, first_lease_s=60.0))
    assert lease(said(engine, Asked("d", 4, "a"), 0.0)).expires_at == 60.0
    said(engine, stored("a", "d"), 5.0)
    said(engine, Merged(1, 4), 6.0)
    assert lease(said(engine, Asked("d", 4, "b"), 7.0)).expires_at == 607.0
    assert lease(said(Engine(Policy(lease_s=20.0)), Asked("d", 4, "a"), 0.0)).expires_at == 20.0


def test_progress_extends_a_first_lease_by_what_the_rest_takes_and_a_first_lease_more() -> None:
    engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0), steps=10)
    work = lease(said(engine, Asked("d", 4, "a"), 0.0))
    assert told(engine, "d", "a", 0, 20.0) == "continue"
    assert work.expires_at == 60.0  # a sign of life, but none of work
    told(engine, "d", "a", 2, 40.0)
    assert work.expires_at == 40.0 + 8 * 20.0 + 60.0
    told(engine, "d", "a", 9, 100.0)
    assert work.expires_at == 260.0  # it is quicker than it seemed, and keeps what it has


@given(beats=st.lists(st.tuples(st.integers(-(10**30), 10**30), st.floats(0.1, 60.0)), max_size=60))
def test_no_heartbeat_keeps_a_slot_beyond_the_whole_time(beats: list[tuple[int, float]]) -> None:
    engine, now = Engine(Policy(concurrency=1, lease_s=600.0, first_lease_s=60.0), steps=20), 0.0
    work = lease(said(engine, Asked("d", 4, "a"), now))
    for done, later_s in beats:
        now += later_s
        told(engine, "d", "a", done, now)
        assert 60.0 <= work.expires_at <= 600.0
        assert 0 <= work.steps_done <= 20
    said(engine, Tick(), max(now, 600.0))
    assert not engine.state.training


def test_a_first_lease_that_has_expired_is_not_finished_early() -> None:
    """A first step may take longer than a first lease: what comes of it counts, whole."""
    engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0), steps=10)
    said(engine, Asked("d", 4, "a"), 0.0)
    assert isinstance(said(engine, Tick(), 60.0)[-1], Expired)
    assert told(engine, "d", "a", 1, 100.0) == "continue"
    assert told(engine, "d", "a", 5, 599.0) == "continue"
    assert told(engine, "d", "a", 6, 600.0) == "finish"


def test_a_first_lease_from_before_a_restart_goes_on_with_what_it_was_not_known_to_have() -> None:
    begun = Lease("a", "d", 0, 4, expires_at=100.0, steps=10, granted_at=-300.0)
    engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0), steps=10)
    said(engine, Restarted(leases=(begun,)), 100.0)
    assert begun.expires_at == 160.0
    told(engine, "d", "a", 9, 150.0)
    assert begun.expires_at == pytest.approx(150.0 + 50.0 + 60.0)
    told(engine, "d", "a", 10, 255.0)
    assert begun.expires_at == 300.0  # 600 s from the grant


# --- leases that come to nothing ------------------------------------------------------------------


def test_leases_that_come_to_nothing_cost_a_pause_that_doubles_up_to_an_hour() -> None:
    engine, now, pauses = Engine(Policy(lease_s=600.0, first_lease_s=60.0)), 0.0, []
    for number in range(9):
        work = lease(said(engine, Asked("d", 4, f"a{number}"), now))
        now += 60.0
        assert said(engine, Tick(), now) == [Expired(work)]
        answer = wait(said(engine, Asked("d", 4, "early"), now))
        assert "nothing came of your last work" in answer.reason
        pauses.append(answer.retry_after_s)
        now += answer.retry_after_s
    assert pauses == pytest.approx([60, 120, 240, 480, 960, 1920, 3600, 3600, 3600])


def test_asking_at_the_last_moment_or_for_other_work_is_no_way_around() -> None:
    for rank, at in ((4, 60.2), (2, 59.0), (2, 30.0)):
        engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0))
        said(engine, Asked("d", 4, "a"), 0.0)
        expired, answer = said(engine, Asked("d", rank, "b"), at)
        assert isinstance(expired, Expired)
        assert isinstance(answer, Wait)
    engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0))
    said(engine, Asked("d", 4, "a"), 0.0)
    lease(said(engine, Asked("d", 2, "b"), 29.0))  # it may not have heard of its grant
    wait(said(engine, Asked("d", 4, "c"), 30.0))  # but not every time


def test_a_byte_of_an_upload_spares_the_pause_and_a_late_update_ends_it() -> None:
    for sends in (True, False):
        engine = Engine(Policy(buffer_size=1, lease_s=20.0))
        said(engine, Asked("d", 4, "a"), 0.0)
        if sends:
            said(engine, BytesArrived("d", "a", 1), 10.0)
        said(engine, Tick(), 21.0)
        if not sends:
            wait(said(engine, Asked("d", 4, "b"), 22.0))
            merge(said(engine, stored("a", "d"), 23.0))
            said(engine, Merged(1, 4), 24.0)
        lease(said(engine, Asked("d", 4, "b"), 25.0))


def test_the_longer_of_two_pauses_holds() -> None:
    engine = Engine(Policy(lease_s=600.0, first_lease_s=60.0, retry_s=2.0))
    said(engine, Asked("d", 4, "a"), 0.0)
    said(engine, Tick(), 60.0)
    said(engine, Refused("d", "a"), 61.0)  # for 2 s; the other pause is 60
    answer = wait(said(engine, Asked("d", 4, "b"), 70.0))
    assert answer.retry_after_s == pytest.approx(50.0)


def test_newer_versions_are_no_fault_of_a_device_that_had_begun() -> None:
    for done, pauses in ((1, False), (0, True)):
        engine = Engine(Policy(buffer_size=1, max_staleness=0, lease_s=59.0, least_version_s=0.0), State())
        work = lease(said(engine, Asked("d", 4, "a"), 0.0))
        told(engine, "d", "a", done, 1.0)
        merge(said(engine, stored("x", "e"), 2.0))
        said(engine, Merged(1, 4), 3.0)
        assert said(engine, Tick(), 3.5) == [Expired(work)]
        assert isinstance(said(engine, Asked("d", 4, "b"), 4.0)[-1], Wait) == pauses


def beside_idlers(idlers: int, **policy: Any) -> VirtualFederation:
    """Four honest devices, which come after those that ask and never work."""
    world = VirtualFederation(Policy(buffer_size=4, quorum=1, timeout_s=20.0, **policy))
    for number in range(idlers):
        ranks = (lambda number: 2 + 2 * (number // 20 % 2)) if number % 2 else (lambda number: 4)
        world.live(world.idle(f"i{number}", ranks))
    for number in range(4):
        world.live(world.honest(f"d{number}", 10.0), 1.0 + number)
    world.run(HOUR_S)
    return world


@pytest.mark.parametrize(
    "policy", [{"concurrency": 4}, {"mode": "synchronous"}, {"mode": "synchronous", "over_selection": 0.5}]
)
def test_those_who_ask_and_never_work_take_few_slots_and_places(policy: dict[str, Any]) -> None:
    """They took all of them: not a version in the first minute, nor later."""
    free, beside = beside_idlers(0, **policy), beside_idlers(8, **policy)
    honest = [f"d{number}" for number in range(4)]
    assert beside.published[0][0] < 2 * 60.0  # four of them after four others, each for a first lease
    merged, best = (sum(map(world.merged, honest)) for world in (beside, free))
    assert merged > 0.75 * best
    half = HOUR_S / 2
    late = sum(device in devices for at, devices in beside.published for device in honest if at > half)
    assert late > 0.85 * best / 2
    idle_s = sum(beside.slot_s[device] for device in beside.slot_s if device not in honest)
    assert idle_s < 0.2 * 4 * HOUR_S


def test_those_who_lie_about_their_progress_take_fewer_and_fewer_slots() -> None:
    world = VirtualFederation(Policy(buffer_size=2, concurrency=2))
    for number in range(4):
        world.live(world.liar(f"l{number}"))
    for number in range(4):
        world.live(world.honest(f"d{number}", 30.0), 1.0)
    world.run(4 * HOUR_S)
    assert all(world.merged(f"d{number}") > 100 for number in range(4))
