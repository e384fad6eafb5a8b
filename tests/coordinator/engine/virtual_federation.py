"""A federation under a virtual clock: honest devices, and some that want its time or its turns."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from coordinator.engine.engine import Engine
from coordinator.engine.events import (
    Asked,
    Beat,
    Grant,
    Lease,
    Merge,
    Merged,
    Offered,
    Stored,
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from tests.coordinator.engine.effects import Said, said, stored

STEPS = 20
TICK_S = 0.5
MERGE_S = 0.2
BEAT_S = 5.0
LATENCY_S = 0.05

Life = Generator[float, None, None]
"""What a device does; it yields how long it does nothing."""


@dataclass
class VirtualFederation:
    """Devices are generators that talk to the engine; `run` lets time pass."""

    policy: Policy
    now: float = 0.0
    published: list[tuple[float, list[str]]] = field(default_factory=list)  # when, and whose updates
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (device, what became of its work)
    slot_s: Counter[str] = field(default_factory=Counter)  # how long each device held a lease

    def __post_init__(self) -> None:
        self.engine = Engine(self.policy, steps=STEPS)
        self._order = itertools.count()
        self._lives: list[tuple[float, int, Life]] = []
        self._ids = itertools.count()
        self.live(self._clock())

    def live(self, life: Life, at: float = 0.0) -> None:
        heapq.heappush(self._lives, (at, next(self._order), life))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._lives[0][0] <= until:
            self.now, _, life = heapq.heappop(self._lives)
            for pause_s in life:
                self.live(life, self.now + pause_s)
                break
        self.now = until

    def merged(self, device: str) -> int:
        return sum(device in devices for _, devices in self.published)

    # --- the coordinator ---

    def _clock(self) -> Life:
        while True:
            self.tell(Tick())
            for device in self.engine.state.training:
                self.slot_s[device] += TICK_S
            yield TICK_S

    def _merge(self, effect: Merge) -> Life:
        yield MERGE_S
        self.published.append((self.now, [update.device for update, _, _ in effect.weights]))
        self.tell(Merged(effect.version, 4))

    def tell(self, event: Asked | Beat | Offered | Stored | Tick | Merged) -> Said | None:
        """The answer, if there is one; a merge begins by itself."""
        answer: Said | None = None
        for effect in said(self.engine, event, self.now):
            if isinstance(effect, Merge):
                self.live(self._merge(effect), self.now)
            answer = effect
        return answer if isinstance(answer, Grant | Wait | Tell) else None

    # --- devices ---

    def ask(self, device: str, rank: int = 4) -> Lease | float:
        """A lease, or how long to wait."""
        answer = self.tell(Asked(device, rank, f"a{next(self._ids)}"))
        if isinstance(answer, Grant):
            return answer.lease
        assert isinstance(answer, Wait)
        self.counts[device, "told to wait"] += 1
        return answer.retry_after_s

    def hand_in(self, lease: Lease, steps: int = STEPS) -> None:
        before = len(self.engine.state.buffer) + len(self.engine.state.merging)
        event = stored(lease.assignment, lease.device, lease.version)
        self.tell(Stored(event.update, steps))
        after = len(self.engine.state.buffer) + len(self.engine.state.merging)
        done = "whole" if steps == STEPS else "in part"
        self.counts[lease.device, f"handed in {done}" if after > before else "declined"] += 1

    def honest(self, device: str, work_s: float) -> Life:
        """Trains, beats, obeys, hands in."""
        while True:
            lease = self.ask(device)
            if not isinstance(lease, Lease):
                yield lease
                continue
            begun, done = self.now, 0
            while done < STEPS:
                yield min(BEAT_S, begun + work_s - self.now + 1e-6)
                done = min(STEPS, int((self.now - begun) / work_s * STEPS))
                answer = self.tell(Beat(device, lease.assignment, lease.version, done))
                assert isinstance(answer, Tell)
                if answer.directive == "abandon" or (answer.directive == "finish" and done):
                    break
            if answer.directive == "abandon":
                self.counts[device, "abandoned"] += 1
            else:
                self.hand_in(lease, done)
            yield LATENCY_S

    def instant(self, device: str) -> Life:
        """Hands in zeros at once, and asks again, whatever it is told."""
        while True:
            lease = self.ask(device)
            if isinstance(lease, Lease):
                self.hand_in(lease)
            yield LATENCY_S

    def idle(self, device: str, ranks: Callable[[int], int] = lambda number: 4) -> Life:
        """Asks and never works."""
        for number in itertools.count():
            self.ask(device, ranks(number))
            yield 1.0

    def liar(self, device: str) -> Life:
        """Says that it works, slowly, and hands in nothing."""
        while True:
            lease = self.ask(device)
            if not isinstance(lease, Lease):
                yield lease
                continue
            for done in (1, 1, 2, 3, 10**9, -5, 4, 5, 6, *range(7, 1000)):
                yield 20.0
                answer = self.tell(Beat(device, lease.assignment, lease.version, done))
                assert isinstance(answer, Tell)
                if answer.directive != "continue":
                    break
