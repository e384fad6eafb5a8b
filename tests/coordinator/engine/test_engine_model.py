"""The engine behind a bad network, beside a naive judge: nothing is lost, nobody is stuck, nothing grows.

Devices ask, beat, send and hand in; every message and every answer may be lost, doubled, overtaken or late;
the coordinator may be killed at any moment; clocks jump; merges fail. `naive_judge` predicts all effects.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from coordinator.engine import actions as do
from coordinator.engine import engine as engine_module
from coordinator.engine.events import Joined, Stored, Tick
from coordinator.engine.policy import Policy
from coordinator.engine.transitions import VERSION, WORK
from tests.coordinator.engine.model_service import Answer, Disk, Job, Service
from tests.coordinator.engine.naive_judge import Judge

DEVICES = ("p", "q", "r", "s", "t", "u")
STEPS = 16
WALKS = 120
ROUNDS = 6000  # in which all get work: a pause of an hour is the longest wait
AT_REST_S = 10.0  # between the work of a device that has had some, while others wait
KINDS = (
    *["ask"] * 4,
    *["hand in"] * 6,
    *["beat"] * 6,
    *["bytes"] * 2,
    *["work well"] * 4,
    *["goes on"] * 5,
    *["arrives"] * 2,
    *["tick"] * 4,
    *["merge ends"] * 7,
    *["asleep", "kill", "revert", "bar"],
)


CHANCE = st.integers(0, 127)


class Choice:
    """Drawn numbers below 128 as several small choices: cheaper, and they shrink to the first of each."""

    def __init__(self, *drawn: int) -> None:
        self.left = sum(number * 128**place for place, number in enumerate(drawn))

    def __call__(self, *options: Any) -> Any:
        self.left, number = divmod(self.left, len(options))
        return options[number]


def a_policy(of: Callable[..., Any]) -> Policy:
    """Any that is accepted and can be met by six devices."""
    mode, k = of("buffered", "synchronous"), of(1, 2, 3, 4)
    timeout_s, lease_s = of(5.0, 40.0), of(20.0, 60.0)
    least = int(lease_s // timeout_s)
    over = of(0.0, 0.3, 1.0) if mode == "synchronous" else 0.0
    slots = of(None, 1, 1, 3)
    if mode == "synchronous" and slots is not None:
        slots = max(slots, math.ceil(k * (1 + over)))
    return Policy(
        mode=mode,
        buffer_size=k,
        quorum=of(*range(1, k + 1)),
        timeout_s=timeout_s,
        over_selection=over,
        concurrency=slots,
        max_staleness=of(None, least, least + 2),
        staleness=of("constant", "polynomial", "hinge"),
        least_version_s=of(None, None, 0.0, 7.0) if mode == "buffered" else None,
        lease_s=lease_s,
        first_lease_s=of(10.0, 60.0),
        deadline_mads=of(1.0, 6.0),
        work_s=of(None, 5.0),
        max_examples=of(10, 10_000),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    return a_policy(lambda *options: draw(st.sampled_from(options)))


class Network(RuleBasedStateMachine):
    """Six devices, a coordinator that is killed now and then, and all that can happen between them."""

    @initialize(policy=policies(), most=st.sampled_from([0, 0, None, 1, 3]))
    def start(self, policy: Policy, most: int | None) -> None:
        self.begin(policy, most)

    def begin(self, policy: Policy, most: int | None) -> None:
        self.policy, self.most = policy, most
        self.disk, self.judge = Disk(), Judge(policy, most, STEPS)
        self.wall = 1e9
        self.wire: list[Job] = []  # requests on their way
        self.jobs: list[Job] = []  # requests that are being answered
        self.known: dict[str, list[str]] = {device: [] for device in DEVICES}  # assignments that it heard of
        self.acknowledged: set[str] = set()
        self.count = 0
        self.restarts(0.0)
        for device in DEVICES:
            self.service.apply(Joined(device))

    def restarts(self, now: float) -> None:
        """What was not on disk is gone, and so are the requests that were being answered."""
        self.jobs = []
        self.service = Service(
            self.policy, self.most, STEPS, self.disk, self.judge.saw, now=now, wall=self.wall
        )

    def heard(self, answer: Answer) -> None:
        """A device got an answer; an acknowledgement is a promise from the moment that it is made."""
        if answer[0] == "work":
            _, device, id = answer
            assert self.disk.work[id].device == device
            if id not in self.known[device]:
                self.known[device].append(id)

    def answered(self, answer: Answer, arrives: bool) -> None:
        if answer[0] == "acknowledged":
            self.acknowledged.add(answer[1])
        if arrives:
            self.heard(answer)

    @rule(kind=st.sampled_from(KINDS), device=st.sampled_from(DEVICES), more=CHANCE, most=CHANCE)
    def happens(self, kind: str, device: str, more: int, most: int) -> None:
        """One rule for all, so that a run has a bit of everything."""
        self.step(kind, device, Choice(more, most))

    def step(self, kind: str, device: str, of: Callable[..., Any]) -> None:  # noqa: C901 one branch a kind
        if kind == "ask":
            self.ask(device, of(4, 4, 4, 8), of(0, 1, 2, 3))
        elif kind == "beat":
            self.beat(device, of(0, 0, 1, 2), of(0, 7, 8, STEPS, 10**9, -3))
        elif kind == "bytes":
            self.bytes_arrive(device, of(0, 0, 1, 2), of(1, 2000, 40_000))
        elif kind == "hand in":
            steps, examples = of(1, 5, STEPS, STEPS), of(1, 30, 10**6)
            self.hand_in(device, of(0, 0, 1, 2), steps, examples, of(True, True, True, False), of(0, 1, 2, 3))
        elif kind == "work well":
            self.work_well(device, of(0.0, 1.0, 9.0))
        elif kind == "arrives" and self.wire:
            self.advance(self.wire.pop(of(0, -1)), of(True, False))
        elif kind == "goes on" and self.jobs:
            self.advance(self.jobs.pop(of(0, -1)), of(True, False))
        elif kind == "tick":
            self.tick(of(0.0, 0.5, 6.0, 25.0, 70.0), of(True, True, False))
        elif kind == "asleep":
            self.passes(of(0.5, 6.0, 25.0))  # no tick comes
        elif kind == "merge ends" and self.service.merge:
            self.merge_ends(of(0, 0, 0, 0, 1, 2, None), of(0, 4, 8), of(True, True, False))
        elif kind == "revert" and self.service.engine.state.version:
            self.service.revert(of(*range(self.service.engine.state.version)))
        elif kind == "bar":
            self.service.bar(device)
        elif kind == "kill":
            self.kill(of(0.0, 0.0, 1e6), of(0.0, 5.0, -100.0, 1e6))

    # --- requests ---

    def id(self) -> str:
        self.count += 1
        return f"a{self.count}"

    def work_of(self, device: str, back: int) -> str | None:
        """An assignment that a device knows, the newest for 0."""
        known = self.known[device]
        return known[-1 - back % len(known)] if known else None

    def send(self, job: Job, mishap: int) -> None:
        """0: it arrives and is answered at once; 1: on its way; 2: lost; else begun, and left."""
        if mishap == 0:
            for _ in range(5):
                self.advance(job, arrives=True)
                if not self.jobs or self.jobs[-1] is not job:
                    return
                self.jobs.pop()
            self.jobs.append(job)  # another request must go on first
        elif mishap == 1:
            self.wire.append(job)
        elif mishap > 2:
            self.advance(job, arrives=True)

    def advance(self, job: Job, arrives: bool) -> None:
        """Let a request go on as far as it next waits for a thread."""
        try:
            next(job)
            self.jobs.append(job)
        except StopIteration as end:
            self.answered(end.value, arrives)

    def ask(self, device: str, rank: int, mishap: int) -> None:
        self.send(self.service.ask(device, rank, rank // 2, self.id()), mishap)

    def beat(self, device: str, back: int, done: int) -> None:
        if id := self.work_of(device, back):
            self.send(self.service.beat(device, id, done), 0)

    def bytes_arrive(self, device: str, back: int, size: int) -> None:
        if id := self.work_of(device, back):
            self.send(self.service.bytes_arrived(device, id, size), 0)

    def hand_in(self, device: str, back: int, steps: int, examples: int, good: bool, mishap: int) -> None:
        if id := self.work_of(device, back):
            self.send(self.service.deliver(device, id, steps, examples, good), mishap)
            if mishap == 3:  # and the same again, side by side
                self.send(self.service.deliver(device, id, steps, examples, good), 3)

    def work_well(self, device: str, seconds: float) -> None:
        """Ask, train and hand in, and nothing goes wrong."""
        self.ask(device, 4, 0)
        self.passes(seconds)
        self.hand_in(device, 0, STEPS, 30, good=True, mishap=0)

    # --- the coordinator ---

    def passes(self, seconds: float) -> None:
        self.service.now += seconds
        self.wall += seconds
        self.service.wall = self.wall

    def tick(self, seconds: float, noted: bool) -> None:
        self.passes(seconds)
        self.service.tick()
        if noted:
            self.service.note_expired()

    def merge_ends(self, bad: int | None, rank: int, told: bool) -> None:
        if self.service.outcome is None:
            self.service.end_merge(bad, rank)
        if told:
            self.service.tell_outcome()

    def kill(self, now: float, clock_s: float) -> None:
        """Start again with another clock; requests on the wire reach the new process."""
        self.wall += clock_s
        self.wire = []  # a connection ends with its process
        self.restarts(now)

    # --- laws ---

    @invariant()
    def laws_hold(self) -> None:
        if hasattr(self, "service"):
            self.every_update_is_in_one_place()
            self.the_leases_are_those_that_were_granted()
            self.memory_is_bounded()
            self.no_version_takes_two_updates_of_a_device()
            if self.most != 0:
                self.privacy_is_kept()

    def every_update_is_in_one_place(self) -> None:
        state = self.service.engine.state
        counted = Counter(id for version in self.judge.published for id in version)
        on_disk = {id for id, kept in self.disk.updates.items() if kept.merged is not None}
        if isinstance(self.service.outcome, type(None)):
            assert counted == Counter(on_disk)  # each once
        for id in self.acknowledged:
            kept = self.disk.updates[id]
            waits = any(u.update == id for u in (*state.buffer, *state.merging))
            if kept.rejected == "barred":  # a merge that is under way ends without it
                assert kept.merged is None
                continue
            assert (kept.merged is not None) + waits + bool(kept.rejected) == 1 or self.service.outcome
            assert kept.rejected in (None, "damaged", "taken back")
        assert state.version == self.judge.version
        assert [u.update for u in state.buffer] == [u.update for u in self.judge.pool]

    def the_leases_are_those_that_were_granted(self) -> None:
        state = self.service.engine.state
        assert state.training == set(self.judge.live())
        for device, held in self.judge.live().items():
            assert state.seats[device].lease.expires_at == pytest.approx(held.until)  # type: ignore[union-attr]

    def no_version_takes_two_updates_of_a_device(self) -> None:
        for version in self.judge.published:
            owners = [self.disk.updates[id].device for id in version]
            assert len(set(owners)) == len(owners)

    def privacy_is_kept(self) -> None:
        assert all(count <= (self.most or math.inf) for count in self.judge.entered.values())

    def memory_is_bounded(self) -> None:
        state = self.service.engine.state
        unmerged = len(state.buffer) + len(state.merging)
        assert unmerged <= len(DEVICES) * (self.policy.staleness_limit + 2)
        for size in sizes(state):
            assert size <= max(len(DEVICES), 8, unmerged)

    def teardown(self) -> None:
        """Whatever happened: once faults end, every device that asks gets work."""
        if hasattr(self, "service"):
            jobs = [*self.wire, *self.jobs]
            for _ in range(100):
                self.jobs = []
                for job in jobs:
                    self.advance(job, arrives=False)
                jobs = self.jobs
            assert jobs == []
            all_get_work(self)


def to_its_end(job: Job) -> Answer:
    while True:
        try:
            next(job)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def sizes(part: Any) -> Iterator[int]:
    """Of every container within."""
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from sizes(getattr(part, field.name))
    elif isinstance(part, dict):
        yield len(part)
        for value in part.values():
            yield from sizes(value)
    elif isinstance(part, (list, tuple, set)):
        yield len(part)
        for value in part:
            yield from sizes(value)


def all_get_work(world: Network) -> None:
    """Devices ask when they were told to, and hand in what they get; a tick every second or so."""
    service = world.service
    retry_at = dict.fromkeys(DEVICES, service.now)
    waiting = set(DEVICES)
    for _ in range(ROUNDS):
        settle(world)
        if not waiting or too_few_have_budget(world):
            return
        for device in [device for device in DEVICES if retry_at[device] <= service.now]:
            settle(world)  # merges take no time: a round that merges has no work
            answer = to_its_end(service.ask(device, 4, 2, world.id()))
            retry_at[device] = service.now + (answer[2] if answer[0] == "wait" else 0.1)
            if answer[0] == "work":
                waiting.discard(device)
                retry_at[device] += AT_REST_S
                to_its_end(service.deliver(device, answer[2], STEPS, 30, True))
            elif world.judge.is_spent(device):
                waiting.discard(device)
        world.passes(max(min(retry_at.values()) - service.now, 0.0) + 0.1)
    raise AssertionError(f"{sorted(waiting)} wait for ever")


def too_few_have_budget(world: Network) -> bool:
    """Under privacy a quorum may not be there any more, and those with budget wait for it."""
    with_budget = [device for device in DEVICES if not world.judge.is_spent(device)]
    return world.most not in (0, None) and len(with_budget) < world.policy.quorum


def settle(world: Network) -> None:
    """Merges succeed."""
    service = world.service
    service.tick()
    service.note_expired()
    while service.merge:
        if service.outcome is None:
            service.end_merge(0, 4)
        service.tell_outcome()


Network.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestNetwork = Network.TestCase


def test_on_long_walks_the_laws_hold_and_every_row_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what shrinks well, and the same walks every time."""
    taken: dict[int, Any] = {}
    first = engine_module.first_row

    def noted(*arguments: Any) -> Any:
        row, at = first(*arguments)
        taken[id(row)] = row
        return row, at

    monkeypatch.setattr(engine_module, "first_row", noted)
    for seed in range(WALKS):
        of, world = at_random(seed), Network()
        world.begin(a_policy(of), of(0, 0, None, 1, 3))
        for _ in range(300):
            world.step(of(*KINDS), of(*DEVICES), of)
            world.laws_hold()
        world.teardown()
    a_round_ends_while_an_update_is_stored()
    a_device_may_fall_behind_no_further()
    late_work_gets_too_old_while_it_is_stored()
    events: list[Any] = [*WORK, *VERSION]
    never = [(one.event, row.do) for one in events for row in one.rows if id(row) not in taken]
    # Ticks go to leases that are over. A budget is not spent between an offer and its storing, since a device
    # has one lease that counts; but the promise of privacy does not rest on that.
    assert never == [(Tick, do.nothing), (Stored, do.decline_unpaid)]


def at_random(seed: int) -> Callable[..., Any]:
    chance = random.Random(seed)
    return lambda *options: chance.choice(options)


def a_round_ends_while_an_update_is_stored() -> None:
    """Which walks seldom meet."""
    world = Network()
    world.begin(Policy(mode="synchronous", buffer_size=1, over_selection=1.0), 0)
    for device in "pq":
        world.ask(device, 4, 0)
    for device in "pq":
        world.hand_in(device, 0, STEPS, 30, good=True, mishap=3)
    world.teardown()
    assert world.judge.published[0] == ("a1",)


def a_device_may_fall_behind_no_further() -> None:
    world = Network()
    world.begin(Policy(buffer_size=1, max_staleness=1, lease_s=20.0), 0)
    world.ask("p", 4, 0)
    world.work_well("q", 1.0)
    world.merge_ends(0, 4, told=True)
    world.beat("p", 0, 1)
    world.teardown()


def late_work_gets_too_old_while_it_is_stored() -> None:
    world = Network()
    world.begin(Policy(buffer_size=1, max_staleness=1, lease_s=20.0, least_version_s=0.0), 0)
    world.ask("p", 4, 0)
    world.tick(20.0, noted=True)
    world.hand_in("p", 0, STEPS, 30, good=True, mishap=3)
    for _ in range(2):
        world.work_well("q", 1.0)
        world.merge_ends(0, 4, told=True)
    world.teardown()
    assert ("a1",) not in world.judge.published
