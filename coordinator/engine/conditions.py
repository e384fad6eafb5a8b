"""When a transition is taken: one question each, whose docstring is its label in docs/ENGINE.md."""

from __future__ import annotations

from coordinator.engine.events import (
    Asked,
    Beat,
    DeviceEvent,
    MergeFailed,
    RevertWanted,
    Stored,
    Tick,
    VersionedEvent,
    WorkEvent,
)
from coordinator.engine.state import Situation, held, ready

# --- of a device that asks ---


def budget_spent(at: Situation[DeviceEvent]) -> bool:
    """Its privacy budget is spent."""
    return at.ration is not None and at.ration.is_spent(at.device, at.pending)


def update_waits(at: Situation[Asked]) -> bool:
    """An update of it was left for the next version; under privacy, any of it waits for one."""
    return at.seat.buffered > 0 and (at.seat.left_over or at.ration is not None)


def same_work(at: Situation[Asked]) -> bool:
    """It asks for the work that it holds, which can still count."""
    lease, event = at.seat.lease, at.event
    if lease is None or at.now >= lease.expires_at or not at.can_count(lease.version) or budget_spent(at):
        return False
    return lease.rank == event.rank and lease.carry_rank <= event.carry_rank


def has_given(at: Situation[Asked]) -> bool:
    """An update of it from this version is in."""
    given = at.seat.contributed
    return given is not None and given >= at.state.version


def must_pause(at: Situation[Asked]) -> bool:
    """Its last update was refused, or its last lease came to nothing, a moment ago."""
    return at.seat.work_from is not None and at.now < at.seat.work_from


def round_is_full(at: Situation[Asked]) -> bool:
    """The synchronous round has its devices, keeps a place for who waits longer, or is being merged."""
    if at.policy.mode != "synchronous":
        return False
    free = at.policy.round_size - len(at.state.in_round() - {at.device})
    return at.state.phase == "merging" or not at.state.line.has_turn(at.device, free, at.now)


def no_slot(at: Situation[Asked]) -> bool:
    """Every slot is taken, or kept for who waits longer."""
    slots = at.policy.concurrency
    if slots is None:
        return False
    free = slots - len(at.state.training)
    return not at.state.line.has_turn(at.device, free, at.now)


# --- of work in hand ---


def replaced(at: Situation[VersionedEvent]) -> bool:
    """Newer work was granted since."""
    newest = at.seat.newest
    return newest is not None and newest != at.event.assignment


def other_work(at: Situation[WorkEvent]) -> bool:
    """It is not the work in hand."""
    return held(at) is None


def stray_and_void(at: Situation[VersionedEvent]) -> bool:
    """It is not the work in hand, and cannot count."""
    return held(at) is None and not at.can_count(at.event.version)


def cannot_count(at: Situation[VersionedEvent]) -> bool:
    """It cannot count: too old, or that device's update is in."""
    return not at.can_count(at.event.version)


def one_version_left(at: Situation[Beat]) -> bool:
    """One version more makes it too old."""
    limit = at.policy.staleness_limit
    return limit > 0 and at.state.version - at.event.version >= limit


def is_awaited(at: Situation[Beat]) -> bool:
    """The time is over without a quorum, and half of it is done."""
    state, lease = at.state, held(at)
    if state.phase != "collecting" or state.first_at is None or lease is None:
        return False
    return at.now - state.first_at >= at.policy.timeout_s and 2 * at.event.steps_done >= lease.steps


def is_first(at: Situation[Beat]) -> bool:
    """It is the first of its device, and the whole time is not over."""
    lease = held(at)
    return lease is not None and at.seat.contributed is None and at.now < lease.granted_at + at.policy.lease_s


def deadline_passed(at: Situation[Tick]) -> bool:
    """Its deadline has passed."""
    lease = at.seat.lease
    return lease is not None and at.now >= lease.expires_at


# --- of the federation ---


def is_due(at: Situation[Stored | Tick]) -> bool:
    """Enough is in, of K devices, or of a quorum after the time-out; and the last version is old enough."""
    state, policy = at.state, at.policy
    if state.first_at is None:
        return False
    waited = at.now - state.first_at >= policy.timeout_s
    enough = policy.quorum if waited else policy.buffer_size
    if len(state.buffer) < enough or _too_soon(at):  # asked at every update, so nothing is counted before
        return False
    return len(ready(state, at.ration)) >= enough


def _too_soon(at: Situation[Stored | Tick]) -> bool:
    """Most devices have not had their share of time since the last version."""
    published_at = at.state.published_at
    if published_at is None:
        return False
    return max(0.0, at.now - published_at) < at.state.tempo.least_version_s(at.policy, at.now)


def still_rests(at: Situation[Stored | Tick | RevertWanted]) -> bool:
    """The pause is not over."""
    return at.state.merge_at is not None and at.now < at.state.merge_at


def some_rejected(at: Situation[MergeFailed]) -> bool:
    """Damaged updates are named."""
    return bool(at.event.rejected)
