"""An event at its moment: what conditions look at and actions change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.engine.events import Lease
from coordinator.engine.policy import Policy
from coordinator.engine.ration import Ration
from coordinator.engine.state import Seat, State


@dataclass(frozen=True)
class Situation:
    """One event, in the state that it meets. `device` is empty for an event of the federation."""

    state: State
    policy: Policy
    ration: Ration | None
    steps: int  # of an assignment that is not cut down
    event: Any
    now: float
    device: str = ""

    @property
    def seat(self) -> Seat:
        """Of the event's device."""
        return self.state.seat(self.device)

    @property
    def held(self) -> Lease | None:
        """The lease that the event is about, if the device still has that work in hand."""
        lease = self.seat.lease
        return lease if lease and lease.assignment == self.event.assignment else None

    @property
    def version(self) -> int:
        """That the event's work began from."""
        event = self.event
        return int(event.update.version if hasattr(event, "update") else event.version)

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
        return state.version - version <= self.policy.staleness_limit
