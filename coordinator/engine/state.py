"""All that decides what happens next in a federation, and an event that meets it.

Bounded by devices + K: nothing grows with time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from coordinator.engine.events import Buffered, Lease, WorkEvent
from coordinator.engine.policy import Policy
from coordinator.engine.tempo import Tempo
from coordinator.engine.waiting_line import WaitingLine

WorkPhase = Literal["idle", "training", "late"]
"""Of a device: without work, with a lease, with work whose lease has expired."""

MergePhase = Literal["collecting", "merging", "resting"]
"""Of the federation: waiting for updates, making a version, pausing after a merge that failed."""


@dataclass
class Seat:
    """What is known of one device."""

    phase: WorkPhase = "idle"
    lease: Lease | None = None  # the work in hand, expired or not; None while idle
    newest: str | None = None  # the assignment that was granted last; what was granted before counts no more
    buffered: int = 0  # updates of it in the buffer
    left_over: bool = False  # one of them was, when a version took another: more would wait ever longer
    contributed: int | None = None  # newest version that an update of it, merged or to be, is from
    paces_s: tuple[float, ...] = ()  # seconds a step of its last assignments, newest last
    refusals: int = 0  # in a row
    idle_leases: int = 0  # in a row: they came to nothing
    work_from: float | None = None  # no work before this
    pause_reason: str = ""


@dataclass
class State:
    """The engine's memory."""

    version: int = 0
    version_rank: int = 0  # live rank of the current global adapter
    phase: MergePhase = "collecting"
    seats: dict[str, Seat] = field(default_factory=dict)
    training: set[str] = field(default_factory=set)  # devices in that phase: they hold the slots
    line: WaitingLine = field(default_factory=WaitingLine)
    tempo: Tempo = field(default_factory=Tempo)
    published_at: float | None = None  # of the current version; None: before this start
    buffer: list[Buffered] = field(default_factory=list)
    first_at: float | None = None  # when the oldest buffered update came
    merging: tuple[Buffered, ...] = ()
    merging_first_at: float | None = None  # when the oldest of those came
    failures: int = 0  # merges in a row that failed for our own reasons
    merge_at: float | None = None  # no merge before this
    taken_back: tuple[tuple[int, int], ...] = ()  # (to, version): those in between count no more

    def seat(self, device: str) -> Seat:
        """A device's seat, made if it has none."""
        return self.seats.setdefault(device, Seat())

    def move(self, device: str, phase: WorkPhase) -> None:
        """Put a device into a phase. In `idle` it has no work in hand."""
        seat = self.seat(device)
        seat.phase = phase
        if phase == "idle":
            seat.lease = None
        if phase == "training":
            self.training.add(device)
        else:
            self.training.discard(device)

    def put(self, updates: Sequence[Buffered], in_front: bool = False) -> None:
        """Add updates to the buffer."""
        place = 0 if in_front else len(self.buffer)
        self.buffer[place:place] = updates
        for update in updates:
            self.seat(update.device).buffered += 1

    def take(self, updates: Sequence[Buffered]) -> None:
        """Remove updates from the buffer."""
        taken = {update.update for update in updates}
        self.buffer = [update for update in self.buffer if update.update not in taken]
        for update in updates:
            seat = self.seat(update.device)
            seat.buffered -= 1
            seat.left_over = seat.buffered > 0

    def leases(self) -> Iterator[Lease]:
        """All leases that have not expired."""
        for device in self.training:
            lease = self.seats[device].lease
            assert lease is not None
            yield lease

    def unmerged(self) -> Iterator[Buffered]:
        """Updates that are in no version yet."""
        yield from self.buffer
        yield from self.merging

    def is_taken_back(self, version: int) -> bool:
        """Whether the host reverted to an older version since."""
        return any(to < version < reverted for to, reverted in self.taken_back)

    def in_round(self) -> set[str]:
        """Devices that have, or have handed in, work from the current version."""
        at_work = {lease.device for lease in self.leases() if lease.version == self.version}
        return at_work | {update.device for update in self.unmerged() if update.version == self.version}


@dataclass
class Ration:
    """Versions that the updates of each device may still enter, under differential privacy.

    Without a limit where `most` is None. Two updates of one device in one version would double what it can
    move; one version more than its budget allows would break the promise made to it. A device without budget
    stays out, and the others go on: the bound holds for each device by itself.
    """

    most: int | None = None  # of a device that has entered none
    left: dict[str, int] = field(default_factory=dict)  # of those that have

    def is_spent(self, device: str, pending: int = 0) -> bool:
        """Whether a device has no version left beyond those that `pending` updates of it wait for."""
        left = self.left.get(device, self.most)
        return left is not None and left <= pending

    def spend(self, devices: Iterable[str]) -> None:
        """Updates of these devices are in a published version."""
        for device in devices:
            left = self.left.get(device, self.most)
            if left is not None:
                self.left[device] = left - 1


def ready(state: State, ration: Ration | None) -> list[Buffered]:
    """What the next version takes: the oldest buffered update of each device. The others wait."""
    oldest: dict[str, Buffered] = {}
    for update in state.buffer:
        # Of two that came in at the same moment only one may have been within the budget.
        if ration is None or not ration.is_spent(update.device):
            oldest.setdefault(update.device, update)
    return list(oldest.values())


Met_co = TypeVar("Met_co", covariant=True)
"""The event of a situation."""


@dataclass(frozen=True)
class Situation(Generic[Met_co]):
    """One event, in the state that it meets: what conditions look at and actions change.

    `steps`: of an assignment that is not cut down. `device` is empty for an event of the federation.
    """

    state: State
    policy: Policy
    ration: Ration | None
    steps: int
    event: Met_co
    now: float
    device: str = ""

    @property
    def seat(self) -> Seat:
        """Of the event's device."""
        return self.state.seat(self.device)

    @property
    def pending(self) -> int:
        """Updates of the device that are in no version yet."""
        return sum(update.device == self.device for update in self.state.unmerged())

    def can_count(self, version: int) -> bool:
        """Whether an update from `version` can still be merged.

        Once per version and in rising order, so that work that arrives twice, by whatever way, counts once.
        A synchronous round that is being merged takes nothing more.
        """
        state = self.state
        given = self.seat.contributed
        if given is not None and version <= given:
            return False
        if self.policy.mode == "synchronous" and state.phase == "merging":
            return False
        if state.is_taken_back(version):
            return False
        return state.version - version <= self.policy.staleness_limit


def held(at: Situation[WorkEvent]) -> Lease | None:
    """The lease that an event is about, if its device still has that work in hand."""
    lease = at.seat.lease
    return lease if lease and lease.assignment == at.event.assignment else None
