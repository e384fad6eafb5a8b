"""Everything that the engine ever does, as two tables of transitions.

The first is the life of one device's work, the second that of a version. In a phase, the first row for an
event whose condition holds is taken; the last row for an event has none. docs/ENGINE.md is drawn from these
tables (`python -m coordinator.engine.diagram`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Never, TypeVar

from coordinator.engine import actions as do
from coordinator.engine import conditions as when
from coordinator.engine.events import (
    Asked,
    Barred,
    Beat,
    BytesArrived,
    Done,
    Effect,
    Event,
    Joined,
    Merged,
    MergeFailed,
    Offered,
    Refused,
    Restarted,
    RevertWanted,
    Stored,
    Tick,
)
from coordinator.engine.state import MergePhase, Situation, WorkPhase

Phase = TypeVar("Phase", WorkPhase, MergePhase)
Met_contra = TypeVar("Met_contra", contravariant=True)


@dataclass(frozen=True)
class Row(Generic[Phase, Met_contra]):
    """One transition: in one of `phases`, `when` that holds (None: always), `do` this and go `to` a phase.

    `to` None: the phase stays.
    """

    phases: tuple[Phase, ...]
    when: Callable[[Situation[Met_contra]], bool] | None
    to: Phase | None
    do: Callable[[Situation[Met_contra]], Done[object]]


@dataclass(frozen=True)
class Pass(Generic[Phase, Met_contra]):
    """A transition that answers nothing: the same event is then handled in the new phase."""

    phases: tuple[Phase, ...]
    when: Callable[[Situation[Met_contra]], bool] | None
    to: Phase
    do: Callable[[Situation[Met_contra]], tuple[Effect, ...]]


AnyRow = Row[Phase, Never] | Pass[Phase, Never]
"""A row of whichever event. It can be given the situations of that event alone."""


@dataclass(frozen=True)
class OnEvent(Generic[Phase]):
    """What becomes of one kind of event, in the order in which rows are tried. Made by `on`."""

    event: type[Event[object]]
    rows: tuple[AnyRow[Phase], ...]


Heard = TypeVar("Heard", bound=Event[object])


def on(event: type[Heard], *rows: Row[Phase, Heard] | Pass[Phase, Heard]) -> OnEvent[Phase]:
    """The rows of an event, whose conditions and actions must be about that event: mypy compares."""
    return OnEvent(event, rows)


_ANY: tuple[WorkPhase, ...] = ("idle", "training", "late")
_FREE: tuple[WorkPhase, ...] = ("idle", "late")
_HELD: tuple[WorkPhase, ...] = ("training", "late")

WORK: tuple[OnEvent[WorkPhase], ...] = (
    on(
        Joined,
        Row(_ANY, None, None, do.nothing),
    ),
    on(
        Asked,
        # A device that asks has no other work in hand, whatever was granted before: it may never have heard.
        Row(("training",), when.same_work, None, do.repeat_grant),
        Pass(("training",), None, "late", do.give_up),
        Row(_FREE, when.budget_spent, "idle", do.wait_for_budget),
        Row(_FREE, when.update_waits, "idle", do.wait_for_own_update),
        Row(_FREE, when.has_given, "idle", do.wait_for_version),
        Row(_FREE, when.must_pause, "idle", do.wait_for_end_of_pause),
        Row(_FREE, when.round_is_full, "idle", do.wait_for_round),
        Row(_FREE, when.no_slot, "idle", do.wait_for_slot),
        Row(_FREE, None, "training", do.grant),
    ),
    on(
        Beat,
        # Work goes on as long as it can count, whoever knows of it.
        Row(_ANY, when.replaced, None, do.tell_abandon),
        Row(_ANY, when.stray_and_void, None, do.tell_abandon),
        Row(_ANY, when.other_work, None, do.tell_continue),
        Row(("training",), when.cannot_count, "idle", do.expire_and_abandon),
        Row(("late",), when.cannot_count, "idle", do.tell_abandon),
        Row(_HELD, when.one_version_left, None, do.tell_finish),
        Row(_HELD, when.is_awaited, None, do.tell_finish),
        Row(("late",), when.is_first, None, do.tell_continue),  # a first lease is short
        Row(("training",), None, None, do.tell_continue),
        Row(("late",), None, None, do.tell_finish),
    ),
    on(
        BytesArrived,
        Row(_ANY, when.other_work, None, do.nothing),
        Row(("training",), None, None, do.extend),
        Row(("late",), None, None, do.nothing),
    ),
    on(
        Tick,
        Row(("training",), when.deadline_passed, "late", do.expire),
        Row(("training",), None, None, do.nothing),
    ),
    on(
        Offered,
        # An adapter is offered, checked and stored; meanwhile a round may have ended.
        Row(_ANY, when.budget_spent, None, do.decline_unpaid),
        Row(_ANY, when.replaced, None, do.decline_replaced),
        Row(_ANY, when.stray_and_void, None, do.decline),
        Row(("training",), when.cannot_count, "idle", do.expire_and_decline),
        Row(("late",), when.cannot_count, "idle", do.decline),
        Row(_ANY, None, None, do.accept),
    ),
    on(
        Stored,
        Row(_ANY, when.budget_spent, None, do.decline_unpaid),
        Row(_ANY, when.replaced, None, do.decline_replaced),
        Row(_ANY, when.stray_and_void, None, do.decline),
        Row(_ANY, when.other_work, None, do.take_in),
        Row(("training",), when.cannot_count, "idle", do.expire_and_decline),
        Row(("late",), when.cannot_count, "idle", do.decline),
        Row(_HELD, None, "idle", do.take_in),
    ),
    on(
        Refused,
        Row(_ANY, when.other_work, None, do.pause_after_refusal),
        Row(("training",), None, "idle", do.expire_and_pause),
        Row(("late",), None, "idle", do.pause_after_refusal),
    ),
    on(
        Barred,
        Row(("training",), None, "idle", do.expire_and_bar),
        Row(_FREE, None, "idle", do.bar),
    ),
)

_AWAKE: tuple[MergePhase, ...] = ("collecting", "merging")

VERSION: tuple[OnEvent[MergePhase], ...] = (
    on(
        Restarted,
        Row(("collecting",), None, None, do.restore),
    ),
    on(
        Stored,
        Row(("collecting",), when.is_due, "merging", do.merge),
        Row(("resting",), when.still_rests, None, do.nothing),
        Pass(("resting",), None, "collecting", do.no_effects),
        Row(_AWAKE, None, None, do.nothing),
    ),
    on(
        Tick,
        Row(("collecting",), when.is_due, "merging", do.merge),
        Row(("resting",), when.still_rests, None, do.nothing),
        Pass(("resting",), None, "collecting", do.no_effects),
        Row(_AWAKE, None, None, do.nothing),
    ),
    on(
        RevertWanted,
        Row(("collecting",), None, "merging", do.revert),
        Row(("resting",), when.still_rests, None, do.nothing),
        Row(("resting",), None, "merging", do.revert),
        Row(("merging",), None, None, do.nothing),
    ),
    on(
        Merged,
        Row(("merging",), None, "collecting", do.publish),
    ),
    on(
        MergeFailed,
        Row(("merging",), when.some_rejected, "collecting", do.put_back),
        Row(("merging",), None, "resting", do.put_back_and_rest),
    ),
)
