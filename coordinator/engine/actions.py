"""What a transition does: it changes the state, answers, and says what is to be done.

Phases are changed by the engine, not here.
An action's docstring is its label in docs/ENGINE.md.
"""

from __future__ import annotations

from coordinator.engine import pacing, weights
from coordinator.engine.events import (
    Accept,
    Asked,
    Barred,
    Beat,
    Buffered,
    BytesArrived,
    Decline,
    Done,
    Effect,
    Expired,
    Grant,
    Lease,
    Merge,
    Merged,
    MergeFailed,
    Offered,
    Published,
    Refused,
    Restarted,
    Revert,
    RevertWanted,
    Stored,
    Tell,
    Tick,
    Wait,
)
from coordinator.engine.policy import Policy
from coordinator.engine.state import Situation, State, held, ready
from edge_sdk.core.errors import StaleUpdate

SPENT = "this device's privacy budget is spent; it trains again if the host raises privacy.max_epsilon"
SPENT_RETRY_S = 600.0  # only a restart of the coordinator changes it
MERGE_RETRY_S, MOST_MERGE_RETRY_S = 1.0, 60.0  # after a merge that failed; doubled each time, up to this
MOST_PAUSE_S = 3600.0  # a device whose updates are refused, or never come, gets work at least this often
REFUSED = "your last update was refused; there is new work after a pause"
BARRED = "the host lets this device take part no more"
IDLE = "nothing came of your last work in its time; there is new work after a pause"
LEAST_BYTES_S = 1024.0  # bytes in flight are life: each keeps a lease for so long, a slow link for hours

# --- answers to a device that asks ---


def grant(at: Situation[Asked]) -> Done[Grant]:
    """Grant a lease."""
    state, seat, event = at.state, at.seat, at.event
    steps = pacing.steps(seat.paces_s, at.steps, at.policy)
    is_new = seat.contributed is None
    lease = Lease(
        assignment=event.assignment,
        device=at.device,
        version=state.version,
        rank=event.rank,
        expires_at=at.now + pacing.lease_s(seat.paces_s, steps, at.policy, is_new),
        carry_rank=min(event.carry_rank, state.version_rank),
        steps=steps,
        granted_at=at.now,
    )
    seat.lease, seat.newest = lease, lease.assignment
    _note_tempo(at, lease)
    state.line.leave(at.device)
    return Done(Grant(lease))


def repeat_grant(at: Situation[Asked]) -> Done[Grant]:
    """Repeat the grant."""
    assert at.seat.lease is not None
    return Done(Grant(at.seat.lease))


def wait_for_budget(at: Situation[Asked]) -> Done[Wait]:
    """Wait."""
    return _wait(at, SPENT, SPENT_RETRY_S)


def wait_for_own_update(at: Situation[Asked]) -> Done[Wait]:
    """Wait."""
    return _wait(at, "your update is in; a version takes one of each device")


def wait_for_version(at: Situation[Asked]) -> Done[Wait]:
    """Wait."""
    return _wait(at, f"your update of version {at.state.version} is in; the next is not due")


def wait_for_end_of_pause(at: Situation[Asked]) -> Done[Wait]:
    """Wait."""
    assert at.seat.work_from is not None
    at.state.line.leave(at.device)
    return Done(Wait(at.seat.work_from - at.now, at.seat.pause_reason))


def wait_for_round(at: Situation[Asked]) -> Done[Wait]:
    """Wait in line."""
    places = at.policy.round_size
    return _wait_in_line(at, places, f"round {at.state.version} has its {places} devices")


def wait_for_slot(at: Situation[Asked]) -> Done[Wait]:
    """Wait in line."""
    slots = at.policy.concurrency
    assert slots is not None
    return _wait_in_line(at, slots, f"{slots} devices are at work, as many as the host wants")


def _wait_in_line(at: Situation[Asked], slots: int, reason: str) -> Done[Wait]:
    seed = at.event.assignment
    retry_s = at.state.line.wait_for_slot(at.device, slots, at.policy.retry_s, seed, at.now)
    return Done(Wait(retry_s, f"{reason}; you are in line"))


def _wait(at: Situation[Asked], reason: str, at_least_s: float = 0.0) -> Done[Wait]:
    """It could not use a slot: were it to keep a place in line, those behind it might wait for each other."""
    at_least_s = max(at_least_s, at.policy.retry_s)
    at.state.line.leave(at.device)
    return Done(Wait(at.state.line.wait(at.device, at_least_s, at.event.assignment, at.now), reason))


# --- work in hand ---


def nothing(at: Situation[object]) -> Done[None]:
    """Nothing."""
    return Done(None)


def no_effects(at: Situation[object]) -> tuple[Effect, ...]:
    """Nothing."""
    return ()


def expire(at: Situation[Tick]) -> Done[None]:
    """Expire the lease; after one that came to nothing the next work comes later."""
    _pause_if_idle(at)
    return Done(None, _expired(at))


def give_up(at: Situation[Asked]) -> tuple[Effect, ...]:
    """Expire the lease; after one that was kept for nothing the next work comes later."""
    seat, lease = at.seat, at.seat.lease
    assert lease is not None
    if at.now - lease.granted_at < at.policy.new_lease_s / 2 and not seat.idle_leases:
        seat.idle_leases = 1  # it may not have heard of its grant, for once
    else:
        _pause_if_idle(at)
    return _expired(at)


def _pause_if_idle(at: Situation[object]) -> None:
    """After a lease without a byte its device gets no work for a while, and then is the last in line.

    It only matters to one that asks again before its late work is in. The pause is as long as it had the slot
    and is doubled every time. Where newer versions cut the lease short the device may just be too slow at
    present: then there is none for a device that had begun, and a limit for the others.
    """
    seat, lease = at.seat, at.seat.lease
    assert lease is not None
    was_cut = not at.can_count(lease.version)
    if lease.has_sent or (was_cut and lease.steps_done):
        return
    seat.idle_leases += 1
    held_s = max(at.policy.new_lease_s, lease.expires_at - lease.granted_at)
    _pause(at, held_s, seat.idle_leases, at.policy.lease_s if was_cut else MOST_PAUSE_S, IDLE)


def _pause(at: Situation[object], first_s: float, times: int, most_s: float, reason: str) -> None:
    """No work for a while: `first_s`, doubled with every time in a row, up to `most_s`."""
    seat = at.seat
    until = at.now + min(most_s, first_s * 2.0 ** min(times - 1, 32))
    if seat.work_from is None or until > seat.work_from:
        seat.work_from, seat.pause_reason = until, reason


def _expired(at: Situation[object]) -> tuple[Effect, ...]:
    assert at.seat.lease is not None
    return (Expired(at.seat.lease),)


def tell_continue(at: Situation[Beat]) -> Done[Tell]:
    """Tell continue."""
    _note_progress(at)
    return Done(Tell("continue"))


def tell_finish(at: Situation[Beat]) -> Done[Tell]:
    """Tell finish."""
    _note_progress(at)
    return Done(Tell("finish"))


def tell_abandon(at: Situation[Beat]) -> Done[Tell]:
    """Tell abandon."""
    return Done(Tell("abandon"))


def expire_and_abandon(at: Situation[Beat]) -> Done[Tell]:
    """Expire the lease, tell abandon."""
    return Done(Tell("abandon"), _expired(at))


def _note_progress(at: Situation[Beat]) -> None:
    """A heartbeat that was overtaken by a later one takes nothing back, and a lie gains no time but once."""
    lease = held(at)
    if lease is None:
        return
    done = min(at.event.steps_done, lease.steps)
    if done > lease.steps_done:
        lease.steps_done = done
        if at.seat.phase == "training" and at.seat.contributed is None:
            lease.expires_at = pacing.extended_to(lease, at.now, at.policy)
    _note_tempo(at, lease)


def _note_tempo(at: Situation[object], lease: Lease) -> None:
    """How long the device takes, as far as can be told now."""
    at.state.tempo.note(at.device, pacing.takes_s(at.seat.paces_s, lease, at.now, at.policy), at.now)


def extend(at: Situation[BytesArrived]) -> Done[None]:
    """Extend the lease."""
    lease = held(at)
    assert lease is not None
    lease.has_sent = True
    lease.expires_at = max(lease.expires_at, at.now + at.event.size_bytes / LEAST_BYTES_S)
    return Done(None)


# --- an update ---


def accept(at: Situation[Offered]) -> Done[Accept]:
    """Accept."""
    return Done(Accept())


def decline(at: Situation[Offered | Stored]) -> Done[Decline]:
    """Decline."""
    return Done(Decline(at.event.assignment, _why_not(at, at.device, at.event.version)))


def decline_replaced(at: Situation[Offered | Stored]) -> Done[Decline]:
    """Decline."""
    current = at.state.version
    why = f"newer work was granted to this device since, and only that counts. Train from version {current}"
    return Done(Decline(at.event.assignment, StaleUpdate(why, current_version=current)))


def decline_unpaid(at: Situation[Offered | Stored]) -> Done[Decline]:
    """Decline."""
    error = StaleUpdate(f"not taken in: {SPENT}; drop it", current_version=at.state.version)
    return Done(Decline(at.event.assignment, error))


def expire_and_decline(at: Situation[Offered | Stored]) -> Done[Decline]:
    """Expire the lease, decline."""
    return Done(decline(at).answer, _expired(at))


def _why_not(at: Situation[object], device: str, version: int) -> StaleUpdate:
    """Why an update of a device from `version` counts no more, and where to go on."""
    current, limit = at.state.version, at.policy.staleness_limit
    given = at.state.seat(device).contributed
    if at.state.is_taken_back(version):
        why = f"trained from version {version}, which the host took back"
    elif current - version > limit:
        why = f"trained from version {version}, {current - version} behind; at most {limit} merge"
    elif given is not None and version <= given:
        why = f"trained from version {version}, from which or a later one this device handed in other work"
    else:
        why = f"round {version} has all its updates and is being merged"
    return StaleUpdate(f"{why}. Train from version {current}", current_version=current)


def take_in(at: Situation[Stored]) -> Done[None]:
    """Buffer it."""
    state, seat, update = at.state, at.seat, at.event.update
    state.put([update])
    state.first_at = at.now if state.first_at is None else state.first_at
    seat.contributed, seat.refusals, seat.idle_leases, seat.work_from = update.version, 0, 0, None
    _note_pace(at)
    return Done(None)


def _note_pace(at: Situation[Stored]) -> None:
    """Remember how long it took."""
    if lease := held(at):
        pace_s = (at.now - lease.granted_at) / (at.event.steps or lease.steps)
        at.seat.paces_s = (*at.seat.paces_s, pace_s)[-pacing.KEPT :]
        _note_usual(at.state, at.device, lease.steps, at.policy, at.now)


def _note_usual(state: State, device: str, steps: int, policy: Policy, now: float) -> None:
    """How long a device that has no work takes for so many steps."""
    usual_s = pacing.usual_s(state.seat(device).paces_s, steps)
    state.tempo.note(device, min(policy.lease_s, usual_s), now)


def pause_after_refusal(at: Situation[Refused]) -> Done[None]:
    """The next work comes later."""
    seat = at.seat
    seat.refusals += 1
    _pause(at, at.policy.retry_s, seat.refusals, MOST_PAUSE_S, REFUSED)
    return Done(None)


def expire_and_pause(at: Situation[Refused]) -> Done[None]:
    """Expire the lease; the next work comes later."""
    lease_over = _expired(at)
    pause_after_refusal(at)
    return Done(None, lease_over)


def bar(at: Situation[Barred]) -> Done[None]:
    """Leave out what waits of it."""
    state, seat = at.state, at.seat
    state.line.leave(at.device)
    state.tempo.forget(at.device)
    gone = [update for update in state.buffer if update.device == at.device]
    state.take(gone)
    if gone and seat.contributed is not None:  # it may work from those versions again, if it is let back
        seat.contributed = min(seat.contributed, min(update.version for update in gone) - 1)
    if not state.buffer:
        state.first_at = None
    error = StaleUpdate(f"{BARRED}; drop it", current_version=state.version)
    return Done(None, tuple(Decline(update.update, error) for update in gone))


def expire_and_bar(at: Situation[Barred]) -> Done[None]:
    """Expire the lease, leave out what waits of it."""
    return Done(None, (*_expired(at), *bar(at).effects))


# --- versions ---


def merge(at: Situation[Stored | Tick]) -> Done[None]:
    """Merge."""
    state = at.state
    taken = ready(state, at.ration)
    state.take(taken)
    state.merging, state.merging_first_at = tuple(taken), state.first_at
    state.first_at, state.merge_at = None, None
    discount = at.policy.staleness
    if at.ration is None:
        weighed = weights.by_examples(taken, state.version, discount, at.policy.max_examples)
    else:
        weighed = weights.by_share(taken, state.version, discount, at.policy.buffer_size)
    return Done(None, (Merge(state.version + 1, weighed),))


def publish(at: Situation[Merged]) -> Done[None]:
    """The new version is the current one."""
    state = at.state
    if at.ration:
        at.ration.spend(update.device for update in state.merging)
    state.version, state.version_rank, state.merging = at.event.version, at.event.rank, ()
    state.failures, state.published_at = 0, at.now
    dropped = () if at.event.reverts_to is None else _take_back(at, at.event.reverts_to)
    state.first_at = at.now if state.buffer else None
    for lease in state.leases():
        too_old = state.version - lease.version > at.policy.staleness_limit
        if too_old or state.is_taken_back(lease.version):  # it holds a slot for nothing
            lease.expires_at = min(lease.expires_at, at.now)
    return Done(None, (*dropped, Published(state.version)))


def _take_back(at: Situation[Merged], to: int) -> tuple[Decline, ...]:
    """Versions after `to` count no more, nor does what was trained from them."""
    state = at.state
    state.taken_back = (*state.taken_back, (to, state.version))
    gone = [update for update in state.buffer if state.is_taken_back(update.version)]
    state.take(gone)
    declined = tuple(Decline(u.update, _why_not(at, u.device, u.version)) for u in gone)
    _forget_taken_back(at)
    return declined


def _forget_taken_back(at: Situation[object]) -> None:
    """Where updates would be too old to be merged anyway, it need not be known that they were taken back."""
    state, oldest = at.state, at.state.version - at.policy.staleness_limit
    state.taken_back = tuple((to, version) for to, version in state.taken_back if version > oldest)


def revert(at: Situation[RevertWanted]) -> Done[None]:
    """Revert."""
    state = at.state
    state.merging, state.merging_first_at, state.merge_at = (), state.first_at, None
    return Done(None, (Revert(state.version + 1, at.event.to),))


def put_back(at: Situation[MergeFailed]) -> Done[None]:
    """Put the others back."""
    state, rejected = at.state, at.event.rejected
    for update in state.merging:
        if update.update in rejected:  # its device may work from that version again
            state.seat(update.device).contributed = update.version - 1
    kept = [update for update in state.merging if update.update not in rejected]
    state.put(kept, in_front=True)
    state.merging, state.failures = (), 0
    for update in state.buffer:
        seat = state.seat(update.device)
        seat.contributed = max(update.version, -1 if seat.contributed is None else seat.contributed)
    if kept:  # what was due by its time still is
        state.first_at = state.merging_first_at
    return Done(None)


def put_back_and_rest(at: Situation[MergeFailed]) -> Done[None]:
    """Put all back; try again later, each time later."""
    state, failures = at.state, at.state.failures
    put_back(at)
    state.failures = failures + 1
    pause_s = min(MOST_MERGE_RETRY_S, MERGE_RETRY_S * 2.0 ** min(state.failures - 1, 32))
    state.merge_at = at.now + pause_s
    return Done(None)


def restore(at: Situation[Restarted]) -> Done[None]:
    """Take up what the disk remembers; what can count no more is declined."""
    state, event = at.state, at.event
    state.version, state.version_rank = event.version, event.rank
    state.taken_back = event.taken_back
    for device, version in event.contributed:
        state.seat(device).contributed = version
    for device, assignment in event.newest:
        state.seat(device).newest = assignment
    for device, paces_s in event.paces_s:
        if paces_s:
            state.seat(device).paces_s = paces_s[-pacing.KEPT :]
            steps = pacing.steps(paces_s, at.steps, at.policy)
            _note_usual(state, device, steps, at.policy, at.now)
    for lease in event.leases:
        _take_up(at, lease)
    declined = [update for update in event.buffer if _is_void(at, update)]
    state.put([update for update in event.buffer if not _is_void(at, update)])
    state.first_at = at.now if state.buffer else None
    effects = tuple(Decline(u.update, _why_not(at, u.device, u.version)) for u in declined)
    _forget_taken_back(at)
    return Done(None, effects)


def _take_up(at: Situation[object], lease: Lease) -> None:
    """Go on with a lease from before a start, which does not know how far it was extended."""
    state, seat, policy = at.state, at.state.seat(lease.device), at.policy
    if seat.contributed is None:
        most = min(lease.granted_at + policy.lease_s, at.now + policy.new_lease_s)
        lease.expires_at = max(lease.expires_at, most)
    seat.lease, seat.newest = lease, lease.assignment
    state.move(lease.device, "training")
    state.tempo.note(lease.device, pacing.takes_s(seat.paces_s, lease, at.now, policy), at.now)


def _is_void(at: Situation[object], update: Buffered) -> bool:
    """Whether a crash came between storing an update and declining it: its round was over, or taken back."""
    if at.state.is_taken_back(update.version):
        return True
    return at.policy.mode == "synchronous" and update.version < at.state.version
