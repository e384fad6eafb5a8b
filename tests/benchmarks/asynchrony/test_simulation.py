"""The simulator of federations: what is virtual must add up by hand, before anything is measured with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest

from benchmarks.asynchrony.devices import TAIL, draw, gflops, median_step_s
from benchmarks.asynchrony.simulation import (
    Conditions,
    Published,
    Trace,
    VirtualDevice,
    VirtualFederation,
    Work,
)
from coordinator.engine.engine import Engine
from coordinator.engine.events import Done, Event, Merge
from coordinator.engine.policy import Policy
from edge_sdk.core.profile import load_profile

Answer = TypeVar("Answer")

STEPS = 4
EXACT = Conditions(drop_out=0.0, jitter=0.0, merge_s=0.0, waking_s=0.0, heartbeat_s=5.0)
PATIENT = Policy(buffer_size=2, quorum=2, timeout_s=1e6, lease_s=1e5, max_staleness=1000, retry_s=1.0)


class Counting:
    """A learner that learns nothing; it remembers who asked it to, and when."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.merges: list[Merge] = []

    def train(self, work: Work) -> int:
        self.works.append(work)
        return 10

    def merge(self, effect: Merge) -> int:
        self.merges.append(effect)
        return 8


class Descent(Counting):
    """One number that updates pull towards 1: a target whose answer is known."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {0: 0.0}
        self.found: dict[str, float] = {}

    def train(self, work: Work) -> int:
        self.found[work.update] = 0.1 * (1.0 - self.values[work.version])
        return super().train(work)

    def merge(self, effect: Merge) -> int:
        change = sum(weight * self.found[buffered.update] for buffered, weight, _ in effect.weights)
        self.values[effect.version] = self.values[effect.version - 1] + change
        return super().merge(effect)


def device(name: str, step_s: float, links_s: float = 0.0) -> VirtualDevice:
    return VirtualDevice(name, 8, step_s, download_s=links_s, upload_s=links_s)


def federation(
    policy: Policy,
    devices: list[VirtualDevice],
    conditions: Conditions = EXACT,
    learner: Counting | None = None,
    seed: int = 0,
) -> VirtualFederation:
    return VirtualFederation(Engine(policy, steps=STEPS), devices, conditions, learner or Counting(), seed)


def run(simulation: VirtualFederation, versions: int, most_s: float = 1e6) -> Trace:
    return simulation.run(lambda published: published.version >= versions, most_s)


def synchronous(**changes: object) -> Policy:
    return replace(PATIENT, mode="synchronous", **changes)


# --- by hand ---


def test_a_round_ends_when_the_slower_of_two_devices_is_done() -> None:
    trace = run(federation(synchronous(), [device("fast", 1.0, 2.0), device("slow", 10.0, 3.0)]), 1)
    assert [v.at_s for v in trace.versions] == [pytest.approx(3.0 + STEPS * 10.0 + 3.0)]
    assert trace.versions[0] == Published(trace.versions[0].at_s, 1, (0, 1), (0, 0))


def test_rounds_follow_each_other_after_a_pause_to_ask_again() -> None:
    trace = run(federation(synchronous(), [device("fast", 1.0), device("slow", 10.0)]), 5)
    times = [v.at_s for v in trace.versions]
    # The slow device hands in the last update and is told to wait for a moment while that is merged.
    for gap in np.diff([0.0, *times]):
        assert 40.0 <= gap <= 40.0 + 2 * PATIENT.retry_s
    assert all(v.devices == (0, 1) for v in trace.versions)


def test_a_buffer_of_one_does_not_wait_for_the_slow_device() -> None:
    learner = Counting()
    policy = replace(PATIENT, buffer_size=1, quorum=1)
    fast, slow = device("fast", 1.0), device("slow", 10.0)
    trace = run(federation(policy, [fast, slow], learner=learner), 1000, most_s=41.0)
    assert trace.versions[0].at_s == pytest.approx(4.0)
    own = [v for v in trace.versions if v.devices == (1,)]
    assert [v.at_s for v in own] == [pytest.approx(40.0)]
    before = [v for v in trace.versions if v.at_s < 40.0]
    assert own[0].staleness == (len(before),)  # it began from version 0
    # The fast one asks for at most 1.5 × 1.25 s more before each of its 4 s of work.
    assert 40 / (4 + 1.5 * 1.25) - 1 <= len(before) <= 10


def test_a_lease_that_runs_out_frees_its_place_in_the_round() -> None:
    never = device("never", 1e9)  # it asks first, so that it has one of the two places
    trace = run(federation(synchronous(lease_s=50.0), [never, device("a", 1.0), device("b", 1.0)]), 1)
    assert set(trace.versions[0].devices) == {1, 2}
    assert 50.0 + STEPS <= trace.versions[0].at_s <= 50.0 + STEPS + 2 * PATIENT.retry_s


def test_a_device_past_its_deadline_hands_in_what_it_has() -> None:
    learner = Counting()
    policy = replace(PATIENT, buffer_size=1, quorum=1, lease_s=12.0)
    trace = run(federation(policy, [device("slow", 10.0)], learner=learner), 1)
    assert [work.steps for work in learner.works] == [2]  # told at 15 s, in the second step
    assert trace.versions[0].at_s == pytest.approx(20.0)
    assert trace.counts["shortened"] == 1


def test_without_parts_it_does_all_of_its_work_whatever_it_is_told() -> None:
    learner = Counting()
    policy = replace(PATIENT, buffer_size=1, quorum=1, lease_s=12.0)
    whole = replace(EXACT, partial=False)
    trace = run(federation(policy, [device("slow", 10.0)], whole, learner), 1)
    assert [work.steps for work in learner.works] == [STEPS]
    assert trace.versions[0].at_s == pytest.approx(STEPS * 10.0)
    assert trace.counts["shortened"] == 0


# --- time ---


class Watching(Engine):
    """An engine that checks when it is spoken to."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, steps=STEPS)
        self.times: list[float] = []

    def handle(self, event: Event[Answer], now: float) -> Done[Answer]:
        self.times.append(now)
        return super().handle(event, now)


def test_the_engine_s_clock_never_goes_backwards() -> None:
    engine = Watching(PATIENT)
    conditions = replace(EXACT, drop_out=0.3, jitter=0.5, away_s=30.0)
    devices = [device(f"d{i}", 0.5 + i) for i in range(6)]
    run(VirtualFederation(engine, devices, conditions, Counting(), 1), 20)
    assert engine.times == sorted(engine.times)


@pytest.mark.parametrize("drop_out", [0.0, 0.2])
def test_no_device_hands_in_before_it_can_have_trained(drop_out: float) -> None:
    conditions = replace(EXACT, drop_out=drop_out, away_s=20.0)
    devices = [device(f"d{i}", 1.0 + i, 0.5) for i in range(4)]
    policy = replace(PATIENT, buffer_size=1, quorum=1, least_version_s=0.0)  # a version for each hand-in
    trace = run(federation(policy, devices, conditions), 60)
    for place, one in enumerate(devices):
        times = [v.at_s for v in trace.versions if v.devices == (place,)]
        for gap in np.diff([0.0, *times]):
            assert gap >= one.assignment_s(STEPS) - 1e-9


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    conditions = replace(EXACT, drop_out=0.2, jitter=0.3, away_s=20.0)
    devices = [device(f"d{i}", 1.0 + i) for i in range(5)]
    first, again, other = (run(federation(PATIENT, devices, conditions, seed=seed), 15) for seed in (3, 3, 4))
    assert first == again
    assert first.versions != other.versions


def test_policies_of_one_seed_meet_the_same_fates() -> None:
    """The n-th attempt of a device is lost, or not, whatever the policy is."""
    conditions = replace(EXACT, drop_out=0.5, away_s=20.0)
    devices = [device("a", 1.0), device("b", 3.0)]
    fates = []
    for policy in (PATIENT, synchronous(lease_s=30.0)):
        simulation = federation(policy, devices, conditions, seed=7)
        fates.append(run(simulation, 20).fates)
    for place in range(len(devices)):
        both = min(len(fate[place]) for fate in fates)
        assert both >= 8
        assert fates[0][place][:both] == fates[1][place][:both]


# --- drop-outs ---


def test_a_lost_assignment_delivers_nothing_and_its_device_comes_back() -> None:
    learner = Counting()
    conditions = replace(EXACT, drop_out=0.4, away_s=10.0)
    policy = replace(PATIENT, buffer_size=1, quorum=1, lease_s=20.0)
    trace = run(federation(policy, [device("a", 1.0), device("b", 2.0)], conditions, learner), 300)
    counts = trace.counts
    assert counts["granted"] - counts["lost"] - counts["delivered"] in (0, 1, 2)  # at work at the end
    assert 0.3 < counts["lost"] / counts["granted"] < 0.5
    assert counts["delivered"] == len(learner.works) == trace.merged
    assert trace.wasted_s > 0


def test_everything_lost_means_no_version_and_an_end() -> None:
    conditions = replace(EXACT, drop_out=1.0, away_s=10.0)
    trace = run(federation(PATIENT, [device("a", 1.0), device("b", 1.0)], conditions), 1, most_s=500.0)
    assert trace.versions == []
    assert trace.counts["lost"] == trace.counts["granted"] > 5


# --- what theory says ---


def hours_to(policy: Policy, devices: list[VirtualDevice], conditions: Conditions = EXACT) -> float:
    """Virtual seconds until the known target is nearly reached."""
    learner = Descent()
    simulation = federation(policy, devices, conditions, learner)
    trace = simulation.run(lambda published: learner.values[published.version] >= 0.9, 1e6)
    assert learner.values[len(trace.versions)] >= 0.9
    return trace.versions[-1].at_s


def test_equal_devices_are_as_fast_by_rounds_as_by_buffers() -> None:
    """Nobody is late, so that the modes differ by who waits how long to be asked again."""
    devices = [device(f"d{i}", 10.0) for i in range(4)]
    policy = replace(PATIENT, buffer_size=4, quorum=4)
    ratio = hours_to(replace(policy, mode="synchronous"), devices) / hours_to(policy, devices)
    assert ratio == pytest.approx(1.0, abs=0.1)


def test_one_slow_device_of_four_costs_rounds_what_it_takes() -> None:
    """Rounds last as long as the slow device; a buffer of three fills without it."""
    devices = [device(f"d{i}", 10.0) for i in range(3)] + [device("slow", 100.0)]
    rounds = hours_to(replace(PATIENT, mode="synchronous", buffer_size=4, quorum=4), devices)
    buffers = hours_to(replace(PATIENT, buffer_size=3, quorum=3), devices)
    assert rounds / buffers == pytest.approx(10.0, rel=0.15)


# --- devices ---


def test_the_slowest_device_is_fifty_times_slower_than_the_median() -> None:
    for seed in range(20):
        devices = draw([2, 4, 8, 16] * 5, 6, seed)
        steps = sorted(d.step_s for d in devices)
        assert steps[-1] / steps[9] == pytest.approx(TAIL)
        assert steps[9] == pytest.approx(median_step_s(devices)) == pytest.approx(100.0)
        assert all(d.download_s > 0 and d.upload_s > 0 for d in devices)
    assert draw([8] * 20, 6, 0) == draw([8] * 20, 6, 0) != draw([8] * 20, 6, 1)


def test_classes_are_as_fast_as_their_sheets_suggest() -> None:
    pi, laptop, card = (
        gflops(load_profile(name)) for name in ("raspberry-pi-5-8gb", "laptop-cpu-16gb", "rtx-4090-24gb")
    )
    assert (pi, laptop, card) == (4 * 15.0, 12 * 15.0, 10_000.0)
