"""Everything that the engine ever does, as two tables of transitions.

The first is the life of one device's work, the second that of a version. In a phase, the first row for an
event whose condition holds is taken; the last row for an event has none. docs/ENGINE.md is drawn from these
tables (`python -m coordinator.engine.diagram`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from coordinator.engine import actions as do
from coordinator.engine import conditions as when
from coordinator.engine.events import (
    Asked,
    Beat,
    BytesArrived,
    Effect,
    Joined,
    Merged,
    MergeFailed,
    Offered,
    Refused,
    Restarted,
    Stored,
    Tick,
)
from coordinator.engine.state import MergePhase, Situation, WorkPhase

Phase = TypeVar("Phase", WorkPhase, MergePhase)
Condition = Callable[[Situation], bool]
Action = Callable[[Situation], list[Effect]]


@dataclass(frozen=True)
class Row(Generic[Phase]):
    """One transition. `to` None: the phase stays.

    `again`: the same event is then handled in the new phase.
    """

    phases: tuple[Phase, ...]
    event: type[Any]
    when: Condition | None
    to: Phase | None
    do: Action
    again: bool = False


_W = Row[WorkPhase]
_ANY: tuple[WorkPhase, ...] = ("idle", "training", "late")
_FREE: tuple[WorkPhase, ...] = ("idle", "late")
_HELD: tuple[WorkPhase, ...] = ("training", "late")

WORK: tuple[Row[WorkPhase], ...] = (
    _W(_ANY, Joined, None, None, do.nothing),
    # A device that asks has no other work in hand, whatever was granted before: it may never have heard.
    _W(("training",), Asked, when.same_work, None, do.repeat_grant),
    _W(("training",), Asked, None, "late", do.expire, again=True),
    _W(_FREE, Asked, when.budget_spent, "idle", do.wait_for_budget),
    _W(_FREE, Asked, when.update_waits, "idle", do.wait_for_own_update),
    _W(_FREE, Asked, when.has_given, "idle", do.wait_for_version),
    _W(_FREE, Asked, when.must_pause, "idle", do.wait_after_refusal),
    _W(_FREE, Asked, when.round_is_full, "idle", do.wait_for_round),
    _W(_FREE, Asked, when.no_slot, "idle", do.wait_for_slot),
    _W(_FREE, Asked, None, "training", do.grant),
    # Work goes on as long as it can count, whoever knows of it.
    _W(_ANY, Beat, when.stray_and_void, None, do.tell_abandon),
    _W(_ANY, Beat, when.other_work, None, do.tell_continue),
    _W(("training",), Beat, when.cannot_count, "idle", do.expire_and_abandon),
    _W(("training",), Beat, when.one_version_left, None, do.tell_finish),
    _W(("training",), Beat, when.is_awaited, None, do.tell_finish),
    _W(("training",), Beat, None, None, do.tell_continue),
    _W(("late",), Beat, when.cannot_count, "idle", do.tell_abandon),
    _W(("late",), Beat, None, None, do.tell_finish),
    _W(_ANY, BytesArrived, when.other_work, None, do.nothing),
    _W(("training",), BytesArrived, None, None, do.extend),
    _W(("late",), BytesArrived, None, None, do.nothing),
    _W(("training",), Tick, when.deadline_passed, "late", do.expire),
    _W(("training",), Tick, None, None, do.nothing),
    # An adapter is offered, checked and stored; meanwhile a round may have ended.
    _W(_ANY, Offered, when.budget_spent, None, do.decline_unpaid),
    _W(_ANY, Offered, when.stray_and_void, None, do.decline),
    _W(("training",), Offered, when.cannot_count, "idle", do.expire_and_decline),
    _W(("late",), Offered, when.cannot_count, "idle", do.decline),
    _W(_ANY, Offered, None, None, do.accept),
    _W(_ANY, Stored, when.budget_spent, None, do.decline_unpaid),
    _W(_ANY, Stored, when.stray_and_void, None, do.decline),
    _W(_ANY, Stored, when.other_work, None, do.take_in),
    _W(("training",), Stored, when.cannot_count, "idle", do.expire_and_decline),
    _W(("late",), Stored, when.cannot_count, "idle", do.decline),
    _W(_HELD, Stored, None, "idle", do.take_in),
    _W(_ANY, Refused, when.other_work, None, do.pause_after_refusal),
    _W(("training",), Refused, None, "idle", do.expire_and_pause),
    _W(("late",), Refused, None, "idle", do.pause_after_refusal),
)

_V = Row[MergePhase]
_AWAKE: tuple[MergePhase, ...] = ("collecting", "merging")

VERSION: tuple[Row[MergePhase], ...] = (
    _V(("collecting",), Restarted, None, None, do.restore),
    _V(("collecting",), Stored, when.is_due, "merging", do.merge),
    _V(("collecting",), Tick, when.is_due, "merging", do.merge),
    _V(("resting",), Stored, when.still_rests, None, do.nothing),
    _V(("resting",), Tick, when.still_rests, None, do.nothing),
    _V(("resting",), Stored, None, "collecting", do.nothing, again=True),
    _V(("resting",), Tick, None, "collecting", do.nothing, again=True),
    _V(_AWAKE, Stored, None, None, do.nothing),
    _V(_AWAKE, Tick, None, None, do.nothing),
    _V(("merging",), Merged, None, "collecting", do.publish),
    _V(("merging",), MergeFailed, when.some_rejected, "collecting", do.put_back),
    _V(("merging",), MergeFailed, None, "resting", do.put_back_and_rest),
)
