"""All that decides what happens next in a federation. Bounded by devices + K: nothing grows with time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from coordinator.engine.events import Buffered, Lease
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
    contributed: int | None = None  # newest version that an update of it, merged or to be, is from
    paces_s: tuple[float, ...] = ()  # seconds a step of its last assignments, newest last
    refusals: int = 0  # in a row
    work_from: float | None = None  # no work before this


@dataclass
class State:
    """The engine's memory."""

    version: int = 0
    version_rank: int = 0  # live rank of the current global adapter
    phase: MergePhase = "collecting"
    seats: dict[str, Seat] = field(default_factory=dict)
    training: set[str] = field(default_factory=set)  # devices in that phase: they hold the slots
    line: WaitingLine = field(default_factory=WaitingLine)
    buffer: list[Buffered] = field(default_factory=list)
    first_at: float | None = None  # when the oldest buffered update came
    merging: tuple[Buffered, ...] = ()
    merging_first_at: float | None = None  # when the oldest of those came
    failures: int = 0  # merges in a row that failed for our own reasons
    merge_at: float | None = None  # no merge before this

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

    def in_round(self) -> set[str]:
        """Devices that have, or have handed in, work from the current version."""
        at_work = {lease.device for lease in self.leases() if lease.version == self.version}
        return at_work | {update.device for update in self.unmerged() if update.version == self.version}
