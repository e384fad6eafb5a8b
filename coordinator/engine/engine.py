"""Every policy on leases, buffers, rounds and staleness, as a pure state machine.

`Engine.handle(event, now)` changes the state and returns effects; it does no I/O, reads no clock and draws
no random numbers, so the same events give the same effects in the server, in a test and under a simulator's
virtual clock. `now` is any clock in seconds that does not go backwards. What it does is written down in
`transitions.py`, row by row; here the rows are looked up and taken.

Buffered mode (FedBuff, Nguyen et al. 2022, arXiv:2106.06639): merge when K updates are in, or T seconds after
the first of them with a quorum. Synchronous mode: K devices, and some more if the host wants, get work from
each version, the merge waits for K of them or for T with a quorum, and an update of an older version is
declined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.engine.events import Effect, Event, Merged, MergeFailed, Restarted, Stored, Tick
from coordinator.engine.policy import Policy
from coordinator.engine.state import MergePhase, Ration, Situation, State, WorkPhase
from coordinator.engine.transitions import VERSION, WORK, Phase, Row
from edge_sdk.core.errors import InternalError


def _by_place(rows: Iterable[Row[Phase]]) -> Mapping[tuple[str, type[Any]], list[Row[Phase]]]:
    """The rows for each phase and event, in their order."""
    found: dict[tuple[str, type[Any]], list[Row[Phase]]] = {}
    for row in rows:
        for phase in row.phases:
            found.setdefault((phase, row.event), []).append(row)
    return found


_WORK, _VERSION = _by_place(WORK), _by_place(VERSION)
_OF_THE_FEDERATION = (Merged, MergeFailed, Restarted)


class Engine:
    """The machine. One per federation; not thread-safe, and it needs not be: a call takes microseconds.

    Args:
        policy: the host's choices.
        state: where to begin; a new federation unless given.
        ration: how often devices may take part under differential privacy; None without it.
        steps: of an assignment that is not cut down to a slow device.
    """

    def __init__(
        self, policy: Policy, state: State | None = None, ration: Ration | None = None, steps: int = 1
    ) -> None:
        self.policy = policy
        self.state = state or State()
        self.ration = ration
        self.steps = steps

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event and return what is to be done about it, in order."""
        if isinstance(event, _OF_THE_FEDERATION):
            effects = self._version(event, now)
            return effects + self._version(Tick(), now) if isinstance(event, Merged) else effects
        if isinstance(event, Tick):
            # Of leases that go on nothing would come: ten thousand of them need no row looked up.
            due = sorted(lease.device for lease in self.state.leases() if now >= lease.expires_at)
            effects = [effect for device in due for effect in self._work(device, event, now)]
            return effects + self._version(event, now)
        effects = self._work(event.device, event, now)
        return effects + self._version(event, now) if isinstance(event, Stored) else effects

    def _work(self, device: str, event: Event, now: float) -> list[Effect]:
        """Take the row of one device."""
        at = Situation(self.state, self.policy, self.ration, self.steps, event, now, device)
        phase: WorkPhase = at.seat.phase
        row = _first(_WORK, phase, at)
        effects = row.do(at)
        if row.to is not None:
            self.state.move(device, row.to)
        return effects + self._work(device, event, now) if row.again else effects

    def _version(self, event: Event, now: float) -> list[Effect]:
        """Take the row of the version that is being made."""
        at = Situation(self.state, self.policy, self.ration, self.steps, event, now)
        phase: MergePhase = self.state.phase
        row = _first(_VERSION, phase, at)
        effects = row.do(at)
        if row.to is not None:
            self.state.phase = row.to
        return effects + self._version(event, now) if row.again else effects


def _first(table: Mapping[tuple[str, type[Any]], list[Row[Phase]]], phase: str, at: Situation) -> Row[Phase]:
    """The row to take.

    Raises:
        InternalError: the event cannot happen in this phase.
    """
    for row in table.get((phase, type(at.event)), ()):
        if row.when is None or row.when(at):
            return row
    raise InternalError(f"{type(at.event).__name__} cannot happen while {phase}")
