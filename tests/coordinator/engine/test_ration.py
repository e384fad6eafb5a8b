"""Under differential privacy: one update of a device in a version, fixed weights, an end to the budget."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.engine.actions import SPENT
from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Accept,
    Asked,
    Buffered,
    Decline,
    Grant,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import Ration, State
from tests.coordinator.engine.effects import Said, merge, names, said, stored


def test_weights_are_fixed_whatever_devices_claim_and_however_many_they_are() -> None:
    engine = Engine(Policy(buffer_size=4, quorum=2, timeout_s=60.0), State(version=3), Ration())
    said(engine, stored("new", "1", version=3, examples=1), 0.0)
    said(engine, stored("old", "2", version=0, examples=10**6), 0.0)
    due = merge(said(engine, Tick(), 60.0))
    assert [weight for _, weight, _ in due.weights] == [1 / 4, 1 / 8]  # (1 + 3)^-½ of a quarter


def test_a_second_update_of_a_device_waits_for_the_next_version() -> None:
    """A late one of version 2 and one of version 3 come in the same buffer."""
    engine = Engine(Policy(buffer_size=2), State(version=3), Ration())
    assert said(engine, stored("late", "d", version=2), 0.0) == []
    assert said(engine, stored("now", "d", version=3), 1.0) == []  # two updates, but one device
    assert names(merge(said(engine, stored("x", "e", version=3), 2.0))) == ["late", "x"]
    said(engine, Merged(4, 8), 3.0)
    assert names(merge(said(engine, stored("y", "e", version=4), 4.0))) == ["now", "y"]


def test_a_failed_merge_keeps_the_order() -> None:
    engine = Engine(Policy(buffer_size=2), State(version=3), Ration(most=5))
    for name, device, version in (("late", "d", 2), ("now", "d", 3), ("x", "e", 3)):
        said(engine, stored(name, device, version), 0.0)
    said(engine, MergeFailed(("x",)), 1.0)
    assert engine.ration is not None
    assert engine.ration.left == {}  # what was not published cost nothing
    assert names(merge(said(engine, stored("y", "e", version=3), 2000.0))) == ["late", "y"]


def test_a_device_with_an_update_in_the_buffer_gets_no_work_that_it_could_not_use() -> None:
    engine = Engine(Policy(buffer_size=3), State(version=3), Ration())
    said(engine, stored("late", "d", version=2), 0.0)
    (answer,) = said(engine, Asked("d", 4, "a"), 1.0)
    assert isinstance(answer, Wait)
    assert "one of each device" in answer.reason


def test_a_device_whose_budget_is_spent_waits_and_the_others_go_on() -> None:
    engine = Engine(Policy(buffer_size=1, least_version_s=0.0), ration=Ration(most=2, left={"old": 0}))
    (answer,) = said(engine, Asked("old", 4, "a0"), 0.0)
    assert isinstance(answer, Wait)
    assert answer.reason == SPENT
    assert answer.retry_after_s > 60
    for version in range(2):
        grant = said(engine, Asked("d", 4, f"a{version}"), 1.0)[-1]
        assert isinstance(grant, Grant)
        assert said(engine, Offered("d", f"a{version}", version), 1.0) == [Accept()]
        merge(said(engine, stored(f"a{version}", "d", version), 1.0))
        if version == 1:  # not published yet, but on its way
            assert isinstance(said(engine, Asked("d", 4, "b"), 2.0)[-1], Wait)
        said(engine, Merged(version + 1, 4), 3.0)
    (answer,) = said(engine, Asked("d", 4, "a2"), 4.0)
    assert isinstance(answer, Wait)
    assert answer.reason == SPENT
    (refusal,) = said(engine, Offered("d", "a2", 2), 4.0)
    assert isinstance(refusal, Decline)
    assert "privacy budget is spent" in str(refusal.error)
    assert isinstance(said(engine, Asked("new", 4, "a3"), 5.0)[0], Grant)


def test_without_privacy_a_device_may_take_part_for_ever_once_in_a_version() -> None:
    engine = Engine(Policy(buffer_size=2, least_version_s=0.0), State(version=1))
    said(engine, stored("one", "d", 0), 0.0)
    assert said(engine, Offered("d", "two", 1), 0.0) == [Accept()]
    assert said(engine, stored("two", "d", 1), 0.0) == []  # two updates, but one device
    assert names(merge(said(engine, stored("x", "e", 1), 0.0))) == ["one", "x"]
    said(engine, Merged(2, 4), 1.0)
    assert names(merge(said(engine, stored("y", "e", 2), 2.0))) == ["two", "y"]


class RationedFederation(RuleBasedStateMachine):
    """Devices that hand in whenever the coordinator lets them, late, twice and after failed merges."""

    most = 3

    @initialize(buffer_size=st.integers(1, 4), quorum=st.integers(1, 4))
    def start(self, buffer_size: int, quorum: int) -> None:
        policy = Policy(buffer_size=buffer_size, quorum=min(quorum, buffer_size), timeout_s=5.0)
        self.engine = Engine(policy, ration=Ration(most=self.most))
        self.now, self.count = 0.0, 0
        self.accepted: list[str] = []
        self.published: list[tuple[Buffered, ...]] = []
        self.under_way: Merge | None = None

    def follow(self, effects: list[Said]) -> None:
        for effect in effects:
            if isinstance(effect, Merge):
                assert self.under_way is None
                self.under_way = effect

    @rule(device=st.sampled_from("abcde"), behind=st.integers(0, 3), asks_first=st.booleans())
    def hand_in(self, device: str, behind: int, asks_first: bool) -> None:
        """Without asking first: of two deliveries at the same moment both may be acknowledged."""
        self.count += 1
        version = max(0, self.engine.state.version - behind)
        offer = Offered(device, f"u{self.count}", version)
        if asks_first and said(self.engine, offer, self.now) != [Accept()]:
            return
        effects = said(self.engine, stored(f"u{self.count}", device, version, self.count), self.now)
        if not any(isinstance(effect, Decline) for effect in effects):
            self.accepted.append(f"u{self.count}")
        self.follow(effects)

    @rule(seconds=st.sampled_from([1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.follow(said(self.engine, Tick(), self.now))

    @rule(fails=st.booleans())
    def end_of_merge(self, fails: bool) -> None:
        if (done := self.under_way) is None:
            return
        self.under_way = None
        if fails:
            self.follow(said(self.engine, MergeFailed(()), self.now))
            return
        self.published.append(tuple(update for update, _, _ in done.weights))
        self.follow(said(self.engine, Merged(done.version, 4), self.now))

    @invariant()
    def no_device_is_in_a_version_twice_or_in_too_many(self) -> None:
        if not hasattr(self, "engine"):
            return
        for version in self.published:
            assert len({update.device for update in version}) == len(version)
        together = Counter(update.device for version in self.published for update in version)
        assert all(count <= self.most for count in together.values())

    @invariant()
    def every_accepted_update_is_in_one_place(self) -> None:
        if not hasattr(self, "engine"):
            return
        state = self.engine.state
        places = [u.update for v in (*self.published, state.buffer, state.merging) for u in v]
        assert sorted(places) == sorted(self.accepted)

    @invariant()
    def weights_do_not_exceed_a_share(self) -> None:
        if getattr(self, "under_way", None) is not None:
            share = 1 / self.engine.policy.buffer_size
            assert all(0 < weight <= share for _, weight, _ in self.under_way.weights)


TestRationedFederation = RationedFederation.TestCase
TestRationedFederation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
