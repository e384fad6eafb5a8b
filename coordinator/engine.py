"""Every policy on leases, buffers, rounds and staleness, as a pure state machine.

`Engine.handle(event, now)` changes the state and returns effects; it does no I/O, reads no clock and draws
no random numbers, so the same events give the same effects in the server, in a test and under a simulator's
virtual clock. `now` is any clock in seconds that does not go backwards.

Buffered mode (FedBuff, Nguyen et al. 2022, arXiv:2106.06639): merge when K updates are in, or T seconds after
the first of them with a quorum. Synchronous mode: K devices get work from each version, the merge waits for
all of them or for T with a quorum, and an update of an older version is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator.events import (
    Asked,
    Beat,
    Buffered,
    Effect,
    Event,
    Expired,
    Grant,
    Lease,
    Merge,
    Merged,
    MergeFailed,
    Refused,
    Stored,
    Tell,
    Tick,
    Wait,
)
from coordinator.policy import Policy
from coordinator.ration import Ration
from edge_sdk.core import staleness
from edge_sdk.core.errors import StaleUpdate

SPENT = "this device's privacy budget is spent; it trains again if the host raises privacy.max_epsilon"
SPENT_RETRY_S = 600.0  # only a restart of the coordinator changes it
MERGE_RETRY_S, MOST_MERGE_RETRY_S = 1.0, 60.0  # after a merge that failed; doubled each time, up to this
MOST_REFUSED_S = 3600.0  # a device whose updates are refused one after another trains at least this often


@dataclass
class State:
    """All that decides what happens next. Bounded by devices + K: nothing here grows with time."""

    version: int = 0
    version_rank: int = 0  # live rank of the current global adapter
    leases: dict[str, Lease] = field(default_factory=dict)  # by device: one each
    buffer: list[Buffered] = field(default_factory=list)
    first_at: float | None = None  # when the oldest buffered update came
    merging: tuple[Buffered, ...] = ()
    contributed: dict[str, int] = field(default_factory=dict)  # device -> version it last trained from
    granted: set[str] = field(default_factory=set)  # devices with work from the current version
    failures: int = 0  # merges in a row that failed for our own reasons
    merge_at: float | None = None  # no merge before this
    refusals: dict[str, tuple[int, float]] = field(default_factory=dict)  # device -> (in a row, work from)


class Engine:
    """The machine. One per federation; not thread-safe, and it needs not be: a call takes microseconds."""

    def __init__(self, policy: Policy, state: State | None = None, ration: Ration | None = None) -> None:
        self.policy = policy
        self.state = state or State()
        self.ration = ration
        self._handlers: dict[type[Any], Callable[[Any, float], list[Effect]]] = {
            Asked: self._asked,
            Beat: self._beat,
            Stored: self._stored,
            Refused: self._refused,
            Tick: self._tick,
            Merged: self._merged,
            MergeFailed: self._merge_failed,
        }

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event and return what is to be done about it, in order."""
        return self._handlers[type(event)](event, now)

    def _limit(self) -> int:
        """The largest staleness that merges."""
        return 0 if self.policy.mode == "synchronous" else self.policy.max_staleness

    def require_mergeable(self, version: int) -> None:
        """Raise StaleUpdate if an update trained from `version` is too old to be merged next."""
        tau, limit = self.state.version - version, self._limit()
        if tau > limit:
            raise StaleUpdate(
                f"trained from version {version}, {tau} behind; at most {limit} merge. Train from "
                f"version {self.state.version}",
                current_version=self.state.version,
            )

    def require_ration(self, device: str) -> None:
        """Raise StaleUpdate if no more updates of this device may be merged: its privacy budget is spent."""
        if self.ration and self.ration.is_spent(device, self._pending(device)):
            raise StaleUpdate(
                f"not taken in: {SPENT}; drop it",
                current_version=self.state.version,
            )

    def _pending(self, device: str) -> int:
        """Updates of a device that are in no version yet."""
        return sum(update.device == device for update in (*self.state.buffer, *self.state.merging))

    def _ration_wait(self, device: str) -> Wait | None:
        """Why a device gets no work under differential privacy, if it gets none."""
        if self.ration is None:
            return None
        if self.ration.is_spent(device, self._pending(device)):
            return Wait(SPENT_RETRY_S, SPENT)
        if any(update.device == device for update in self.state.buffer):
            return Wait(self.policy.retry_s, "your update is in; a version takes one of each device")
        return None

    def _asked(self, event: Asked, now: float) -> list[Effect]:
        """Grant work, repeat the grant that a device already holds, or say when to come back."""
        state, policy = self.state, self.policy
        if wait := self._ration_wait(event.device):
            return [wait]
        held = state.leases.get(event.device)
        can_count = held and now < held.expires_at and state.version - held.version <= self._limit()
        if held and can_count and held.rank == event.rank and held.carry_rank <= event.carry_rank:
            return [Grant(held)]
        if state.contributed.get(event.device) == state.version:
            return [
                Wait(policy.retry_s, f"your update of version {state.version} is in; the next is not due")
            ]
        _, work_from = state.refusals.get(event.device, (0, now))
        if now < work_from:
            return [Wait(work_from - now, "your last update was refused; there is new work after a pause")]
        if policy.mode == "synchronous" and len(state.granted - {event.device}) >= policy.buffer_size:
            return [Wait(policy.retry_s, f"round {state.version} has its {policy.buffer_size} devices")]
        expires_at = now + policy.lease_s
        carry_rank = min(event.carry_rank, state.version_rank)
        lease = Lease(event.assignment, event.device, state.version, event.rank, expires_at, carry_rank)
        state.leases[event.device] = lease
        state.granted.add(event.device)
        expired: list[Effect] = [Expired(held)] if held else []
        return [*expired, Grant(lease)]

    def _beat(self, event: Beat, now: float) -> list[Effect]:
        """Note progress. Work goes on as long as it can count, its lease expired or not."""
        lease = self.state.leases.get(event.device)
        held = lease if lease and lease.assignment == event.assignment else None
        if held:
            held.steps_done = event.steps_done
        try:
            self.require_mergeable(event.version)
        except StaleUpdate:
            if held:
                del self.state.leases[event.device]
            return [*([Expired(held)] if held else []), Tell("abandon")]
        return [Tell("continue")]

    def _stored(self, event: Stored, now: float) -> list[Effect]:
        """Buffer an update and close its lease."""
        state = self.state
        update = event.update
        state.buffer.append(update)
        state.first_at = now if state.first_at is None else state.first_at
        state.contributed[update.device] = max(update.version, state.contributed.get(update.device, 0))
        state.refusals.pop(update.device, None)
        lease = state.leases.get(update.device)
        if lease and lease.assignment == update.update:
            del state.leases[update.device]
        return self._merge_if_due(now)

    def _refused(self, event: Refused, now: float) -> list[Effect]:
        """End the lease, because the same work again would be refused again; the next waits longer each time.

        A device that mends its upload may still hand it in for the assignment, as after any expired lease.
        """
        state = self.state
        in_a_row = state.refusals.get(event.device, (0, now))[0] + 1
        pause_s = min(MOST_REFUSED_S, self.policy.retry_s * 2.0 ** min(in_a_row - 1, 32))
        state.refusals[event.device] = (in_a_row, now + pause_s)
        lease = state.leases.get(event.device)
        if lease is None or lease.assignment != event.assignment:
            return []
        del state.leases[event.device]
        state.granted.discard(event.device)
        return [Expired(lease)]

    def _tick(self, event: Tick, now: float) -> list[Effect]:
        """Expire leases, and merge what a time-out made due."""
        late = [lease for lease in self.state.leases.values() if now >= lease.expires_at]
        for lease in late:
            del self.state.leases[lease.device]
            self.state.granted.discard(lease.device)
        return [*(Expired(lease) for lease in late), *self._merge_if_due(now)]

    def _merged(self, event: Merged, now: float) -> list[Effect]:
        """The new version is the current one."""
        state = self.state
        if self.ration:
            self.ration.spend(update.device for update in state.merging)
        state.version, state.version_rank, state.merging = event.version, event.rank, ()
        state.granted = set()
        state.failures, state.merge_at = 0, None
        state.first_at = now if state.buffer else None
        return self._merge_if_due(now)

    def _merge_failed(self, event: MergeFailed, now: float) -> list[Effect]:
        """Put the innocent updates back in front of the buffer.

        Where some were rejected the next tick merges the others. Otherwise it waits: what failed for our own
        reasons would fail again at once, and read every update for it. A device whose update is out may work
        from this version again: nobody else may be there to end it.
        """
        state = self.state
        kept = [update for update in state.merging if update.update not in event.rejected]
        for update in state.merging:
            state.contributed.pop(update.device, None)
        state.buffer, state.merging = [*kept, *state.buffer], ()
        for update in state.buffer:
            state.contributed[update.device] = max(update.version, state.contributed.get(update.device, 0))
        state.first_at = now if state.buffer else None
        state.failures = 0 if event.rejected else state.failures + 1
        pause_s = min(MOST_MERGE_RETRY_S, MERGE_RETRY_S * 2.0 ** min(state.failures - 1, 32))
        state.merge_at = None if event.rejected else now + pause_s
        return []

    def _merge_if_due(self, now: float) -> list[Effect]:
        """Start a merge if none runs and K updates, or a quorum and the time-out, are reached."""
        state, policy = self.state, self.policy
        if state.merging or not state.buffer or state.first_at is None:
            return []
        if state.merge_at is not None and now < state.merge_at:
            return []
        waited = now - state.first_at >= policy.timeout_s
        ready = self._ready()
        if len(ready) < policy.buffer_size and not (waited and len(ready) >= policy.quorum):
            return []
        state.buffer = [update for update in state.buffer if update not in ready]
        state.merging, state.first_at = tuple(ready), None
        return [Merge(state.version + 1, self._weights(state.merging))]

    def _ready(self) -> list[Buffered]:
        """What the next version takes: all that is buffered; under a ration the oldest of each device."""
        if self.ration is None:
            return self.state.buffer
        oldest: dict[str, Buffered] = {}
        for update in self.state.buffer:
            # Of two that came in at the same moment only one may have been within the budget.
            if not self.ration.is_spent(update.device):
                oldest.setdefault(update.device, update)
        return list(oldest.values())

    def _weights(self, updates: tuple[Buffered, ...]) -> tuple[tuple[Buffered, float, int], ...]:
        """ŵ_k ∝ n_k·s(τ_k), with n_k capped, summing to 1; under a ration s(τ_k)/K."""
        discount = staleness.FUNCTIONS[self.policy.staleness]
        taus = [self.state.version - update.version for update in updates]
        if self.ration is not None:
            share = 1.0 / self.policy.buffer_size
            return tuple((u, share * discount(tau), tau) for u, tau in zip(updates, taus, strict=True))
        raw = [
            min(update.examples, self.policy.max_examples) * discount(tau)
            for update, tau in zip(updates, taus, strict=True)
        ]
        total = sum(raw)
        return tuple((u, w / total, tau) for u, w, tau in zip(updates, raw, taus, strict=True))
