"""A federation in virtual time: the production engine, and devices that take time and get lost.

Discrete events: a heap of (time, what happens then). Nothing sleeps and nothing reads a clock, so that a day
of a federation takes as long as what its devices learn takes to compute, and the same seed gives the same
run. What an update is, and what merging does, is the `Learner`'s: the simulation knows of times alone.

A device asks, downloads, trains step by step, uploads, and asks again, as `edge_sdk` does: it beats while it
trains and obeys the answer, waits as long as it is told and up to a quarter more, and asks again at once
where its work came to nothing. An assignment is lost with some probability: the device falls silent at some
moment of it, with all that it did, and comes back later.

What a device meets, attempt by attempt, comes from a stream of random numbers of its own, so that policies
of one seed meet the same devices, losses and delays.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Asked,
    Beat,
    Buffered,
    BytesArrived,
    Decline,
    Event,
    Joined,
    Lease,
    Merge,
    Merged,
    Offered,
    Stored,
    Tick,
    Wait,
)

Answer = TypeVar("Answer")

ASK_SPREAD = 0.25  # a device waits up to this share longer than it is told
PIECE_BYTES = 1 << 16  # of an upload, one each heartbeat


@dataclass(frozen=True)
class VirtualDevice:
    """What a device costs in time. `step_s`: seconds of a training step; the others of one assignment."""

    name: str
    rank: int
    step_s: float
    download_s: float
    upload_s: float
    carry_rank: int = 0

    def assignment_s(self, steps: int) -> float:
        """An assignment of `steps` steps, from the grant to the last byte, where nothing goes wrong."""
        return self.download_s + steps * self.step_s + self.upload_s


@dataclass(frozen=True)
class Conditions:
    """What holds for all devices. Times in virtual seconds."""

    drop_out: float = 0.2  # share of assignments that are lost without a word
    away_s: float = 600.0  # mean time until such a device is back; exponential
    jitter: float = 0.2  # σ of the log-normal by which one assignment's training time differs from the next
    heartbeat_s: float = 30.0
    tick_s: float = 1.0
    merge_s: float = 2.0  # from the merge to the version
    waking_s: float = 30.0  # devices ask for the first time at some moment within this
    partial: bool = True  # devices that are told to finish hand in a part; else all steps or nothing


@dataclass(frozen=True)
class Work:
    """Training that was done, and is accepted."""

    update: str
    device: int
    version: int  # that it began from
    rank: int
    carry_rank: int
    steps: int


class Learner(Protocol):
    """What is learnt while time passes."""

    def train(self, work: Work) -> int:
        """Make the update; returns the number of examples."""

    def merge(self, effect: Merge) -> int:
        """Make the version; returns its live rank."""


@dataclass(frozen=True)
class Published:
    """A version: when, and of which devices' updates, in the order of `staleness`."""

    at_s: float
    version: int
    devices: tuple[int, ...]
    staleness: tuple[int, ...]


@dataclass
class Trace:
    """What happened. `counts`: granted, lost, abandoned, declined, shortened, delivered."""

    versions: list[Published] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    fates: dict[int, list[bool]] = field(default_factory=dict)  # device: which of its attempts are to be lost
    trained_s: float = 0.0  # device-seconds
    wasted_s: float = 0.0  # of these, on what was lost, abandoned or declined

    @property
    def merged(self) -> int:
        """Updates in all versions."""
        return sum(len(version.devices) for version in self.versions)


@dataclass
class _Attempt:
    """A device at work on a lease."""

    lease: Lease
    step_s: float
    began_s: float  # training, after the download
    steps: int
    finishing: bool = False

    def done(self, now: float) -> int:
        """Steps done by `now`."""
        return min(self.steps, max(0, int((now - self.began_s) / self.step_s)))


class VirtualFederation:
    """Devices around an engine.

    Args:
        engine: the coordinator's, new.
        devices: who takes part; their places are their numbers in `Work`.
        conditions: what holds for all.
        learner: trains and merges.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        engine: Engine,
        devices: Sequence[VirtualDevice],
        conditions: Conditions,
        learner: Learner,
        seed: int,
    ) -> None:
        self.now = 0.0
        self.trace = Trace()
        self._engine, self._devices, self._conditions = engine, devices, conditions
        self._learner = learner
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._ids = np.random.default_rng([seed, 4])
        self._fates = [np.random.default_rng([seed, 1, place]) for place in range(len(devices))]
        self._waits = [np.random.default_rng([seed, 2, place]) for place in range(len(devices))]
        self._attempts: dict[int, _Attempt] = {}
        self._places = {device.name: place for place, device in enumerate(devices)}
        for place, device in enumerate(devices):
            self._handle(Joined(device.name))
            self._after(conditions.waking_s * self._waits[place].random(), self._ask, place)
        self._after(conditions.tick_s, self._tick)

    def run(self, stop: Callable[[Published], bool], most_s: float) -> Trace:
        """Go on until `stop` says so of a version, or until `most_s`."""
        while self._heap and self._heap[0][0] <= most_s:
            known = len(self.trace.versions)
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)
            if len(self.trace.versions) > known and stop(self.trace.versions[-1]):
                return self.trace
        self.now = max(self.now, most_s)
        return self.trace

    def _after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen; of two things at one time the one that was said first comes first."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._order), action, arguments))

    def _handle(self, event: Event[Answer]) -> Answer:
        """Begin the merges that the engine wants; its answer is for the caller's device."""
        done = self._engine.handle(event, self.now)
        for effect in done.effects:
            if isinstance(effect, Merge):
                self._after(self._conditions.merge_s, self._publish, effect)
        return done.answer

    def _tick(self) -> None:
        self._handle(Tick())
        self._after(self._conditions.tick_s, self._tick)

    def _publish(self, effect: Merge) -> None:
        """The version is there."""
        rank = self._learner.merge(effect)
        devices = tuple(self._places[update.device] for update, _, _ in effect.weights)
        staleness = tuple(tau for _, _, tau in effect.weights)
        self.trace.versions.append(Published(self.now, effect.version, devices, staleness))
        self._handle(Merged(effect.version, rank))

    # --- a device ---

    def _ask(self, place: int) -> None:
        """Work, or a pause."""
        device = self._devices[place]
        asked = Asked(device.name, device.rank, self._ids.bytes(12).hex(), device.carry_rank)
        answer = self._handle(asked)
        if isinstance(answer, Wait):
            longer = 1.0 + ASK_SPREAD * self._waits[place].random()
            self._after(answer.retry_after_s * longer, self._ask, place)
            return
        self._begin(place, answer.lease)

    def _begin(self, place: int, lease: Lease) -> None:
        """Take up a lease. What will become of it is drawn now, the same numbers whatever happens."""
        device, conditions, fate = self._devices[place], self._conditions, self._fates[place]
        lost, moment, slower, away = fate.random(), fate.random(), fate.normal(), fate.exponential()
        self.trace.counts["granted"] += 1
        self.trace.fates.setdefault(place, []).append(lost < conditions.drop_out)
        step_s = device.step_s * float(np.exp(conditions.jitter * slower))
        attempt = _Attempt(lease, step_s, self.now + device.download_s, lease.steps)
        self._attempts[place] = attempt
        train_s = attempt.steps * step_s
        self._after(device.download_s + conditions.heartbeat_s, self._beat, place, attempt)
        if lost < conditions.drop_out:
            whole_s = device.download_s + train_s + device.upload_s
            self._after(moment * whole_s, self._vanish, place, attempt, away * conditions.away_s)
        self._after(device.download_s + train_s, self._trained, place, attempt, attempt.steps)

    def _vanish(self, place: int, attempt: _Attempt, away_s: float) -> None:
        """The device falls silent; nothing of this attempt happens any more."""
        if self._attempts.get(place) is attempt:
            self._end(place, attempt, "lost")
            self._after(away_s, self._ask, place)

    def _end(self, place: int, attempt: _Attempt, outcome: str) -> None:
        """The attempt is over; unless it was delivered its training was for nothing."""
        del self._attempts[place]
        self.trace.counts[outcome] += 1
        seconds = attempt.done(self.now) * attempt.step_s
        self.trace.trained_s += seconds
        self.trace.wasted_s += 0.0 if outcome == "delivered" else seconds

    def _beat(self, place: int, attempt: _Attempt) -> None:
        """Report progress while training, and obey."""
        if self._attempts.get(place) is not attempt or attempt.finishing:
            return
        lease, done = attempt.lease, attempt.done(self.now)
        if done >= attempt.steps:
            return
        answer = self._handle(Beat(lease.device, lease.assignment, lease.version, done))
        if answer.directive == "abandon":
            self._end(place, attempt, "abandoned")
            self._ask(place)
            return
        if answer.directive == "finish" and self._conditions.partial and done + 1 < attempt.steps:
            attempt.steps, attempt.finishing = done + 1, True  # the step in hand is the last
            self.trace.counts["shortened"] += 1
            end_s = attempt.began_s + attempt.steps * attempt.step_s
            self._after(end_s - self.now, self._trained, place, attempt, attempt.steps)
            return
        self._after(self._conditions.heartbeat_s, self._beat, place, attempt)

    def _trained(self, place: int, attempt: _Attempt, steps: int) -> None:
        """All steps are done: upload. `steps` as they were when this was planned."""
        if self._attempts.get(place) is attempt and steps == attempt.steps:
            self._upload(place, attempt, self._devices[place].upload_s)

    def _upload(self, place: int, attempt: _Attempt, left_s: float) -> None:
        """Pieces arrive one after another; the last is the update."""
        if self._attempts.get(place) is not attempt:
            return
        if left_s <= 0:
            self._deliver(place, attempt)
            return
        piece_s = min(left_s, self._conditions.heartbeat_s)
        self._after(piece_s, self._piece, place, attempt, left_s - piece_s)

    def _piece(self, place: int, attempt: _Attempt, left_s: float) -> None:
        """A piece is there."""
        if self._attempts.get(place) is attempt:
            lease = attempt.lease
            self._handle(BytesArrived(lease.device, lease.assignment, PIECE_BYTES))
            self._upload(place, attempt, left_s)

    def _deliver(self, place: int, attempt: _Attempt) -> None:
        """The last byte is there: taken in, or declined."""
        lease = attempt.lease
        offered = self._handle(Offered(lease.device, lease.assignment, lease.version))
        if isinstance(offered, Decline):
            self._end(place, attempt, "declined")
        else:
            self._end(place, attempt, "delivered")
            work = Work(lease.assignment, place, lease.version, lease.rank, lease.carry_rank, attempt.steps)
            update = Buffered(lease.assignment, lease.device, lease.version, self._learner.train(work))
            self._handle(Stored(update, attempt.steps))
        self._ask(place)
