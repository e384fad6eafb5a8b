"""Every policy on leases, buffers, rounds and staleness, as a pure state machine.

`Engine.handle(event, now)` changes the state, and returns the answer for whoever brought the event and what
is to be done. It does no I/O, reads no clock and draws no random numbers, so the same events come to the same
in the server, in a test and under a simulator's virtual clock. `now` is any clock in seconds that does not go
backwards. What it does is written down in `transitions.py`, row by row; here the rows are looked up and
taken.

Buffered mode (FedBuff, Nguyen et al. 2022, arXiv:2106.06639): merge when updates of K devices are in, or T
seconds after the first of them with a quorum, and not too soon after the last version. Synchronous mode: K
devices, and some more if the host wants, get work from each version, the merge waits for K of them or for T
with a quorum, and an update of an older version is declined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Never, TypeVar, cast

from coordinator.engine.events import (
    DeviceEvent,
    Done,
    Effect,
    Event,
    Merged,
    Stored,
    Tick,
    VersionEvent,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import MergePhase, Ration, Situation, State, WorkPhase
from coordinator.engine.transitions import VERSION, WORK, AnyRow, OnEvent, Pass, Phase
from edge_sdk.core.errors import InternalError

Answer = TypeVar("Answer")
PhaseAndEvent = tuple[str, type[Event[object]]]
"""A phase, and a kind of event that may come in it."""


def _by_place(table: Iterable[OnEvent[Phase]]) -> Mapping[PhaseAndEvent, list[AnyRow[Phase]]]:
    """The rows for each phase and event, in their order."""
    found: dict[PhaseAndEvent, list[AnyRow[Phase]]] = {}
    for one in table:
        for row in one.rows:
            for phase in row.phases:
                found.setdefault((phase, one.event), []).append(row)
    return found


_WORK, _VERSION = _by_place(WORK), _by_place(VERSION)


class Engine:
    """The machine. One per federation; not thread-safe, and it need not be: a call takes microseconds.

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

    def handle(self, event: Event[Answer], now: float) -> Done[Answer]:
        """Apply one event.

        Returns:
            The answer that such an event is due, and what is to be done about it, in order.
        """
        effects: list[Effect] = []
        answer: object = None
        if isinstance(event, DeviceEvent):
            answer, of_work = self._work(event.device, event, now)
            effects += of_work
            if isinstance(event, Stored):
                effects += self._version(event, now)
        elif isinstance(event, Tick):
            # Of leases that go on nothing would come: ten thousand of them need no row looked up.
            for device in sorted(lease.device for lease in self.state.leases() if now >= lease.expires_at):
                effects += self._work(device, event, now)[1]
            effects += self._version(event, now)
        elif isinstance(event, VersionEvent):
            effects += self._version(event, now)
            if isinstance(event, Merged):
                effects += self._version(Tick(), now)
        # Which rows an event has decides what it is answered with; a test compares them with its parameter.
        return Done(cast("Answer", answer), tuple(effects))

    def _work(self, device: str, event: Event[object], now: float) -> tuple[object, tuple[Effect, ...]]:
        """Take the row of one device: the answer, and what is to be done."""
        at = Situation(self.state, self.policy, self.ration, self.steps, event, now, device)
        phase: WorkPhase = at.seat.phase
        row, known = first_row(_WORK, phase, at)
        if isinstance(row, Pass):
            before = row.do(known)
            self.state.move(device, row.to)
            answer, effects = self._work(device, event, now)
            return answer, before + effects
        done = row.do(known)
        if row.to is not None:
            self.state.move(device, row.to)
        return done.answer, done.effects

    def _version(self, event: Event[object], now: float) -> tuple[Effect, ...]:
        """Take the row of the version that is being made."""
        at = Situation(self.state, self.policy, self.ration, self.steps, event, now)
        phase: MergePhase = self.state.phase
        row, known = first_row(_VERSION, phase, at)
        if isinstance(row, Pass):
            before = row.do(known)
            self.state.phase = row.to
            return before + self._version(event, now)
        done = row.do(known)
        if row.to is not None:
            self.state.phase = row.to
        return done.effects


def first_row(
    table: Mapping[PhaseAndEvent, list[AnyRow[Phase]]], phase: str, at: Situation[Event[object]]
) -> tuple[AnyRow[Phase], Situation[Never]]:
    """The row to take, and the situation as that row may look at it.

    Raises:
        InternalError: the event cannot happen in this phase.
    """
    # Rows are looked up by the event's own type, so that whichever is found is about such an event.
    known = cast("Situation[Never]", at)
    for row in table.get((phase, type(at.event)), ()):
        if row.when is None or row.when(known):
            return row, known
    raise InternalError(f"{type(at.event).__name__} cannot happen while {phase}")
