"""The policy on leases, buffers and rounds: events made by hand, then at random against a naive model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Accept,
    Asked,
    Beat,
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
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import State
from edge_sdk.core.errors import InputError, StaleUpdate
from tests.coordinator.engine.effects import Said, merge, names, said, stored


def declined(effects: list[Said]) -> StaleUpdate:
    assert isinstance(effects[-1], Decline), effects
    return effects[-1].error


def granted(effects: list[Said]) -> Grant:
    assert isinstance(effects[-1], Grant), effects
    return effects[-1]


# --- buffered -------------------------------------------------------------------------------------


def test_k_updates_make_a_version() -> None:
    engine = Engine(Policy(buffer_size=3))
    assert said(engine, stored("a", "1"), 0.0) == []
    assert said(engine, stored("b", "2"), 1.0) == []
    due = merge(said(engine, stored("c", "3"), 2.0))
    assert (due.version, names(due)) == (1, ["a", "b", "c"])
    assert engine.state.version == 0  # until it is on disk
    assert said(engine, Merged(1, 5), 3.0) == [Published(1)]
    assert (engine.state.version, engine.state.version_rank) == (1, 5)


def test_weights_are_capped_examples_times_the_staleness_discount() -> None:
    engine = Engine(Policy(buffer_size=3, max_examples=100), State(version=3))
    said(engine, stored("now", "1", version=3, examples=50), 0.0)
    said(engine, stored("old", "2", version=0, examples=80), 0.0)
    due = merge(said(engine, stored("boastful", "3", version=3, examples=10**9), 0.0))
    # 50·1, 80·(1+3)^-0.5 = 40, 100·1: of 190.
    assert [weight for _, weight, _ in due.weights] == pytest.approx([50 / 190, 40 / 190, 100 / 190])
    assert [tau for _, _, tau in due.weights] == [0, 3, 0]


def test_the_staleness_function_is_the_policys() -> None:
    engine = Engine(Policy(buffer_size=2, staleness="constant"), State(version=3))
    said(engine, stored("a", "1", version=3), 0.0)
    due = merge(said(engine, stored("b", "2", version=0), 0.0))
    assert [weight for _, weight, _ in due.weights] == [0.5, 0.5]


def test_a_quorum_suffices_once_the_time_is_over() -> None:
    engine = Engine(Policy(buffer_size=4, quorum=2, timeout_s=60.0))
    said(engine, stored("a", "1"), 10.0)
    assert said(engine, Tick(), 100.0) == []  # time is over, the quorum is not there
    due = merge(said(engine, stored("b", "2"), 101.0))
    assert names(due) == ["a", "b"]


def test_the_time_runs_from_the_first_update() -> None:
    engine = Engine(Policy(buffer_size=4, quorum=2, timeout_s=60.0))
    said(engine, stored("a", "1"), 10.0)
    said(engine, stored("b", "2"), 69.0)
    assert said(engine, Tick(), 69.9) == []
    assert names(merge(said(engine, Tick(), 70.0))) == ["a", "b"]


def test_a_device_contributes_once_to_a_version() -> None:
    engine = Engine(Policy(buffer_size=2, retry_s=2.0))
    assignment = granted(said(engine, Asked("d", 4, "a1"), 0.0)).lease.assignment
    said(engine, stored(assignment, "d"), 1.0)
    (answer,) = said(engine, Asked("d", 4, "a2"), 2.0)
    assert isinstance(answer, Wait)
    assert 2.0 <= answer.retry_after_s <= 3.0
    assert "version 0" in answer.reason
    said(engine, stored("x", "e"), 3.0)
    said(engine, Merged(1, 4), 4.0)
    assert granted(said(engine, Asked("d", 4, "a3", carry_rank=9), 5.0)).lease == Lease(
        "a3", "d", 1, 4, 605.0, carry_rank=4, granted_at=5.0
    )


def test_a_device_that_asks_again_gets_the_grant_that_it_holds() -> None:
    engine = Engine(Policy(lease_s=600.0, first_lease_s=600.0), State(version=2, version_rank=7))
    first = granted(said(engine, Asked("d", 4, "a1", carry_rank=8), 0.0))
    again = granted(said(engine, Asked("d", 4, "a2", carry_rank=9), 599.0))
    assert first == Grant(Lease("a1", "d", 2, 4, 600.0, carry_rank=7, granted_at=0.0))
    assert again == Grant(Lease("a1", "d", 2, 4, 600.0, carry_rank=7, granted_at=0.0))


def test_asking_at_another_rank_replaces_the_grant() -> None:
    engine = Engine(Policy())
    first = granted(said(engine, Asked("d", 4, "a1"), 0.0)).lease
    expired, grant = said(engine, Asked("d", 2, "a2"), 1.0)
    assert expired == Expired(first)
    assert isinstance(grant, Grant)
    assert (grant.lease.assignment, grant.lease.rank) == ("a2", 2)


@pytest.mark.parametrize(("asked", "granted_rank"), [(0, 0), (3, 3), (7, 7), (99, 7)])
def test_the_carry_rank_is_what_the_device_can_hold_of_what_there_is(asked: int, granted_rank: int) -> None:
    engine = Engine(Policy(), State(version=2, version_rank=7))
    assert granted(said(engine, Asked("d", 4, "a1", asked), 0.0)).lease.carry_rank == granted_rank


def test_a_device_that_can_hold_less_than_before_gets_another_grant() -> None:
    engine = Engine(Policy(), State(version=2, version_rank=7))
    first = granted(said(engine, Asked("d", 4, "a1", 5), 0.0)).lease
    assert said(engine, Asked("d", 4, "a2", 6), 1.0) == [Grant(first)]  # more memory changes nothing
    expired, grant = said(engine, Asked("d", 4, "a3", 4), 2.0)
    assert expired == Expired(first)
    assert isinstance(grant, Grant)
    assert (grant.lease.assignment, grant.lease.carry_rank) == ("a3", 4)


@pytest.mark.parametrize("mode", ["buffered", "synchronous"])
def test_a_grant_that_can_no_longer_count_is_not_repeated(mode: Any) -> None:
    engine = Engine(Policy(mode=mode, max_staleness=0, buffer_size=1, lease_s=59.0))
    old = granted(said(engine, Asked("slow", 4, "a1"), 0.0)).lease
    said(engine, stored("x", "fast"), 1.0)
    said(engine, Merged(1, 4), 2.0)
    expired, grant = said(engine, Asked("slow", 4, "a2"), 3.0)
    assert expired == Expired(old)
    assert isinstance(grant, Grant)
    assert (grant.lease.assignment, grant.lease.version) == ("a2", 1)


def test_a_lease_expires_and_its_late_update_still_counts() -> None:
    engine = Engine(Policy(buffer_size=1, lease_s=10.0))
    lease = granted(said(engine, Asked("d", 4, "a1"), 0.0)).lease
    assert said(engine, Tick(), 9.9) == []
    assert said(engine, Tick(), 10.0) == [Expired(lease)]
    assert not engine.state.training
    assert said(engine, Tick(), 11.0) == []
    assert names(merge(said(engine, stored("a1", "d"), 12.0))) == ["a1"]


def test_a_heartbeat_of_work_that_can_count_goes_on_and_leaves_a_trace() -> None:
    engine = Engine(Policy(lease_s=10.0))
    said(engine, Asked("d", 4, "a1"), 0.0)
    assert said(engine, Beat("d", "a1", 0, 7), 1.0) == [Tell("continue")]
    assert engine.state.seats["d"].lease.steps_done  # type: ignore[union-attr] == 7
    said(engine, Tick(), 10.0)  # expired: it may finish all the same
    assert said(engine, Beat("d", "a1", 0, 9), 11.0) == [Tell("finish")]


def test_a_heartbeat_of_work_too_stale_is_told_to_abandon_it() -> None:
    engine = Engine(Policy(max_staleness=2, buffer_size=1, lease_s=100.0, least_version_s=0.0))
    lease = granted(said(engine, Asked("slow", 4, "a1"), 0.0)).lease
    for version in (1, 2, 3):
        # One more version would make it too old: what it has now still counts.
        word = "finish" if version == 3 else "continue"
        assert said(engine, Beat("slow", "a1", 0, version), 1.0) == [Tell(word)]  # type: ignore[arg-type]
        said(engine, stored(f"u{version}", "fast", version - 1), 2.0)
        said(engine, Merged(version, 4), 3.0)
    lease.steps_done = 3
    assert said(engine, Beat("slow", "a1", 0, 4), 4.0) == [Expired(lease), Tell("abandon")]
    assert engine.state.seats["slow"].idle_leases == 0  # newer versions are no fault of its own
    assert said(engine, Beat("slow", "a1", 0, 4), 5.0) == [Tell("abandon")]
    assert granted(said(engine, Asked("slow", 4, "a2"), 6.0)).lease.version == 3


def test_a_stale_update_is_refused_with_the_version_to_train_from() -> None:
    engine = Engine(Policy(max_staleness=2, lease_s=100.0), State(version=7))
    assert said(engine, Offered("d", "a5", 5), 0.0) == [Accept()]
    error = declined(said(engine, Offered("d", "a4", 4), 0.0))
    assert "version 4, 3 behind; at most 2 merge. Train from version 7" in str(error)
    assert error.details == {"current_version": 7}


# --- merges ---------------------------------------------------------------------------------------


def test_updates_that_come_during_a_merge_are_for_the_next() -> None:
    engine = Engine(Policy(buffer_size=1))
    assert names(merge(said(engine, stored("a", "1"), 0.0))) == ["a"]
    assert said(engine, stored("b", "2"), 1.0) == []
    assert said(engine, stored("c", "3"), 2.0) == []
    assert said(engine, Tick(), 1e6) == []  # one merge at a time, however long it takes
    published, due = said(engine, Merged(1, 4), 1e6)
    assert published == Published(1)
    assert isinstance(due, Merge)
    assert (due.version, names(due), [tau for _, _, tau in due.weights]) == (2, ["b", "c"], [1, 1])


def test_a_failed_merge_puts_the_innocent_back_and_leaves_the_rejected_out() -> None:
    engine = Engine(Policy(buffer_size=3))
    for device in "123":
        said(engine, stored(f"u{device}", device), 0.0)
    said(engine, stored("u4", "4"), 1.0)
    assert said(engine, MergeFailed(("u2",)), 2.0) == []
    assert [update.update for update in engine.state.buffer] == ["u1", "u3", "u4"]
    due = merge(said(engine, Tick(), 2.5))
    assert (due.version, names(due)) == (1, ["u1", "u3", "u4"])


def test_a_device_whose_update_was_rejected_gets_work_again() -> None:
    engine = Engine(Policy(buffer_size=1))
    said(engine, stored("a", "only"), 0.0)
    said(engine, MergeFailed(("a",)), 1.0)
    assert engine.state.buffer == []
    assert granted(said(engine, Asked("only", 4, "b"), 2.0)).lease.assignment == "b"


def failed_at(engine: Engine, now: float) -> float:
    """Fail the merge that runs; in how many seconds the next one starts."""
    said(engine, MergeFailed(()), now)
    wait = 0.0
    while not said(engine, Tick(), now + wait):
        wait += 0.5
    return wait


def test_a_merge_that_fails_for_our_own_reasons_is_tried_less_and_less_often() -> None:
    engine = Engine(Policy(buffer_size=1))
    said(engine, stored("a", "1"), 0.0)
    assert [failed_at(engine, 1000.0 * n) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    said(engine, MergeFailed(()), 9000.0)
    assert said(engine, stored("b", "2"), 9001.0) == []  # another update does not hurry it
    assert names(merge(said(engine, Tick(), 9060.0))) == ["a", "b"]


def test_a_merge_that_worked_forgets_the_failures() -> None:
    engine = Engine(Policy(buffer_size=1, least_version_s=0.0))
    for version in (1, 2):
        said(engine, stored(f"u{version}", "1", version - 1), 0.0)
        assert failed_at(engine, 100.0 * version) == 1
        said(engine, Merged(version, 4), 100.0 * version + 50)
    assert names(merge(said(engine, stored("a", "1", 2), 250.0))) == ["a"]  # and nothing is held back


def test_rejected_updates_do_not_delay_the_others() -> None:
    engine = Engine(Policy(buffer_size=2))
    for device in "123":
        said(engine, stored(f"u{device}", device), 0.0)
    said(engine, MergeFailed(()), 1.0)
    merge(said(engine, Tick(), 2.0))
    said(engine, stored("u4", "4"), 2.0)
    said(engine, MergeFailed(("u1", "u2")), 3.0)
    assert names(merge(said(engine, Tick(), 3.0))) == ["u3", "u4"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_refused_device_gets_other_work_after_a_pause_that_grows() -> None:
    engine, now = Engine(Policy(retry_s=2.0, lease_s=1e6)), 0.0
    for number, pause_s in enumerate((2.0, 4.0, 8.0)):
        lease = granted(said(engine, Asked("d", 4, f"a{number}"), now)).lease
        assert lease.assignment == f"a{number}"  # not the same work again
        assert said(engine, Refused("d", lease.assignment), now) == [Expired(lease)]
        (answer,) = said(engine, Asked("d", 4, "early"), now + pause_s / 2)
        assert isinstance(answer, Wait)
        assert answer.retry_after_s == pytest.approx(pause_s / 2)
        assert "refused" in answer.reason
        now += pause_s
    for number in range(50):
        said(engine, Refused("d", f"b{number}"), now)
    (answer,) = said(engine, Asked("d", 4, "early"), now)
    assert isinstance(answer, Wait)
    assert answer.retry_after_s == 3600.0  # never longer than this


def test_an_accepted_update_ends_the_pauses() -> None:
    engine = Engine(Policy(buffer_size=5))
    lease = granted(said(engine, Asked("d", 4, "a"), 0.0)).lease
    said(engine, Refused("d", "a"), 1.0)
    said(engine, stored("a", "d"), 1.5)  # mended and handed in again, for the same assignment
    assert engine.state.seats["d"].refusals == 0
    assert not engine.state.training
    assert lease.assignment == "a"


def test_a_refusal_frees_the_place_in_a_round() -> None:
    engine = rounds()
    for device in "12":
        said(engine, Asked(device, 4, f"a{device}"), 0.0)
    said(engine, Refused("2", "a2"), 1.0)
    assert granted(said(engine, Asked("3", 4, "a3"), 1.0)).lease.device == "3"


# --- synchronous ----------------------------------------------------------------------------------


def rounds(**other: Any) -> Engine:
    return Engine(Policy(mode="synchronous", buffer_size=2, quorum=1, timeout_s=30.0, lease_s=60.0, **other))


def test_a_round_has_k_devices() -> None:
    engine = rounds()
    for device in "12":
        assert granted(said(engine, Asked(device, 4, f"a{device}"), 0.0)).lease.assignment == f"a{device}"
    (answer,) = said(engine, Asked("3", 4, "a3"), 0.0)
    assert isinstance(answer, Wait)
    assert "round 0 has its 2 devices" in answer.reason


def test_a_round_that_lost_a_device_takes_another() -> None:
    engine = rounds()
    for device, at in (("1", 0.0), ("2", 30.0)):
        said(engine, Asked(device, 4, f"a{device}"), at)
    assert isinstance(said(engine, Tick(), 60.0)[0], Expired)
    assert granted(said(engine, Asked("3", 4, "a3"), 61.0)).lease.assignment == "a3"
    assert isinstance(said(engine, Asked("1", 4, "a4"), 62.0)[-1], Wait)


def test_a_round_is_over_at_its_time_with_a_quorum_and_what_comes_later_is_refused() -> None:
    engine = rounds()
    for device in "12":
        said(engine, Asked(device, 4, f"a{device}"), 0.0)
    said(engine, stored("a1", "1"), 5.0)
    assert said(engine, Tick(), 34.0) == []
    assert names(merge(said(engine, Tick(), 35.0))) == ["a1"]
    said(engine, Merged(1, 4), 36.0)
    assert declined(said(engine, Offered("2", "a2", 0), 37.0)).details == {"current_version": 1}
    assert said(engine, Beat("2", "a2", 0, 3), 37.0)[-1] == Tell("abandon")
    assert granted(said(engine, Asked("2", 4, "a5"), 38.0)).lease.version == 1


def test_a_whole_round_does_not_wait() -> None:
    engine = rounds()
    said(engine, stored("a1", "1"), 5.0)
    assert names(merge(said(engine, stored("a2", "2"), 6.0))) == ["a1", "a2"]


# --- the policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("buffer_size", 0),
        ("quorum", 0),
        ("timeout_s", -1.0),
        ("timeout_s", math.nan),
        ("server_learning_rate", 0.0),
        ("lease_s", -5.0),
        ("retry_s", 0.0),
        ("max_examples", 0),
        ("max_staleness", -1),
    ],
)
def test_a_policy_error_names_the_key(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"policy.{setting} is {value}"):
        Policy(**{setting: value})


def test_a_quorum_above_the_buffer_is_refused() -> None:
    with pytest.raises(InputError, match="policy.quorum is 5, above policy.buffer_size 4"):
        Policy(buffer_size=4, quorum=5)


# --- against a naive model ------------------------------------------------------------------------

DEVICES = ("p", "q", "r", "s")
RANKS = (2, 4)


class Federation(RuleBasedStateMachine):
    """Random devices on one engine; the model remembers every assignment and update that ever was."""

    @initialize(
        mode=st.sampled_from(["buffered", "synchronous"]),
        buffer_size=st.integers(1, 5),
        quorum=st.integers(1, len(DEVICES)),
        max_staleness=st.integers(0, 3),
        timeout_s=st.sampled_from([5.0, 50.0]),
    )
    def start(self, mode: Any, buffer_size: int, quorum: int, max_staleness: int, timeout_s: float) -> None:
        self.engine = Engine(
            Policy(
                mode=mode,
                buffer_size=buffer_size,
                quorum=min(quorum, buffer_size),
                timeout_s=timeout_s,
                max_staleness=max(max_staleness, int(20.0 // timeout_s)),
                lease_s=20.0,
                least_version_s=0.0,
            )
        )
        self.limit = self.engine.policy.staleness_limit
        self.now = 0.0
        self.version = 0
        self.work: dict[str, tuple[str, int]] = {}  # assignment -> device, version: delivered or not
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.pending: Merge | None = None
        self.counted_in: dict[str, int] = {}
        self.rejected: set[str] = set()
        self.paused_until: dict[str, float] = {}
        self.newest: dict[str, str] = {}

    def send(self, event: Any) -> list[Said]:
        effects = said(self.engine, event, self.now)
        for effect in effects:
            if isinstance(effect, Merge):
                assert self.pending is None
                assert effect.version == self.version + 1
                assert math.isclose(sum(weight for _, weight, _ in effect.weights), 1.0)
                for update, weight, tau in effect.weights:
                    assert weight > 0
                    assert tau == self.version - update.version
                self.pending = effect
            if isinstance(effect, Expired):  # there may be a pause
                self.paused_until[effect.lease.device] = self.now + 3600.0
        return effects

    def can_count(self, assignment: str) -> bool:
        device, version = self.work[assignment]
        if self.newest[device] != assignment:
            return False
        closed = self.engine.policy.mode == "synchronous" and self.pending is not None
        counted = [
            v for u, (owner, v) in self.acknowledged.items() if owner == device and u not in self.rejected
        ]
        return not closed and self.version - version <= self.limit and all(v < version for v in counted)

    def waits(self, device: str) -> bool:
        """Whether an update of this device, trained from the current version, is in and may yet count."""
        return any(
            owner == device and version == self.version and update not in self.rejected
            for update, (owner, version) in self.acknowledged.items()
        )

    @rule(device=st.sampled_from(DEVICES), rank=st.sampled_from(RANKS))
    def ask(self, device: str, rank: int) -> None:
        self.ask_for(device, rank)

    def ask_for(self, device: str, rank: int) -> Said:
        answer = self.send(Asked(device, rank, f"a{len(self.work)}"))[-1]
        if isinstance(answer, Grant):
            lease = answer.lease
            assert (lease.device, lease.rank) == (device, rank)
            assert lease.expires_at > self.now
            assert self.version - lease.version <= self.limit  # what is granted can count
            if lease.assignment not in self.work:
                assert lease.version == self.version
                assert not self.waits(device)
                self.work[lease.assignment] = (device, lease.version)
                self.newest[device] = lease.assignment
            assert self.work[lease.assignment] == (device, lease.version)
        else:
            assert isinstance(answer, Wait)
            paused = self.now < self.paused_until.get(device, 0.0)
            assert self.waits(device) or paused or self.engine.policy.mode == "synchronous"
            assert answer.retry_after_s > 0
        return answer

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        assignment = data.draw(st.sampled_from(sorted(self.work)))
        device, version = self.work[assignment]
        answer = self.send(Beat(device, assignment, version, 1))[-1]
        assert isinstance(answer, Tell)
        assert (answer.directive == "abandon") == (not self.can_count(assignment))

    @precondition(lambda self: self.work)
    @rule(data=st.data(), examples=st.integers(1, 10**6))
    def deliver(self, data: st.DataObject, examples: int) -> None:
        self.hand_in(data.draw(st.sampled_from(sorted(self.work))), examples)

    def hand_in(self, assignment: str, examples: int = 1) -> None:
        device, version = self.work[assignment]
        if assignment in self.acknowledged:
            return  # the store answers a repeated delivery
        answer = self.send(Offered(device, assignment, version))[-1]
        assert isinstance(answer, Accept if self.can_count(assignment) else Decline)
        if isinstance(answer, Decline):
            return
        self.acknowledged[assignment] = (device, version)
        self.send(stored(assignment, device, version, examples))

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """Something unusable was handed in for some assignment, old or new."""
        assignment = data.draw(st.sampled_from(sorted(self.work)))
        device, _ = self.work[assignment]
        if assignment in self.acknowledged:
            return
        self.send(Refused(device, assignment))
        self.paused_until[device] = self.now + 3600.0
        lease = self.engine.state.seat(device).lease
        assert lease is None or lease.assignment != assignment

    @rule(seconds=st.sampled_from([0.5, 6.0, 25.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.send(Tick())

    @precondition(lambda self: self.pending)
    @rule()
    def merged(self) -> None:
        assert self.pending is not None
        done, self.pending = self.pending, None
        for update, _, _ in done.weights:
            assert update.update not in self.counted_in
            self.counted_in[update.update] = done.version
        self.version += 1
        self.send(Merged(done.version, 4))

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        assert self.pending is not None
        candidates = [update.update for update, _, _ in self.pending.weights]
        self.pending = None
        bad = data.draw(st.lists(st.sampled_from(candidates), max_size=1))
        self.rejected.update(bad)
        self.send(MergeFailed(tuple(bad)))

    @invariant()
    def every_update_is_in_one_place(self) -> None:
        if not hasattr(self, "engine"):
            return
        state = self.engine.state
        held = [update.update for update in (*state.buffer, *state.merging)]
        places = sorted([*held, *self.counted_in, *self.rejected])
        assert places == sorted(self.acknowledged)
        assert state.version == self.version
        assert len(state.training) <= len(DEVICES)

    def teardown(self) -> None:
        """Whatever happened: after the longest pause, in three timely rounds that succeed, all get work."""
        if not hasattr(self, "engine"):
            return
        self.now += 3600.0
        waiting = list(DEVICES)
        for _ in range(3 * len(DEVICES)):
            self.settle()
            for device in [*waiting, *(d for d in DEVICES if d not in waiting)]:
                answer = self.ask_for(device, 2)
                if isinstance(answer, Grant):
                    waiting = [d for d in waiting if d != device]
                    self.hand_in(answer.lease.assignment)
            if not waiting:
                return
        raise AssertionError(f"{waiting} wait for ever")

    def settle(self) -> None:
        """Let time-outs pass and merges succeed until nothing more happens by itself."""
        self.now += 100.0
        self.send(Tick())
        while self.pending:
            self.merged()


Federation.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFederation = Federation.TestCase
