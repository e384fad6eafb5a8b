"""What the engine is told after a start: everything that it must know follows from the rows on disk."""

from __future__ import annotations

from coordinator.engine import pacing
from coordinator.engine.events import Buffered, Lease, Restarted
from coordinator.storage.rows import StoredUpdate
from coordinator.storage.store import Store
from edge_sdk.core.messages import Assignment


def recalled(store: Store, now: float, clock_time: float) -> Restarted:
    """The federation as the disk has it.

    Args:
        store: of the data folder.
        now: by the engine's clock, which begins anew with every start.
        clock_time: the same moment by the clock that rows are dated with, seconds since 1970.
    """
    newest = store.versions(1)
    return Restarted(
        version=newest[0].version if newest else 0,
        rank=newest[0].rank if newest else 0,
        leases=tuple(
            _lease(device, assignment, now, clock_time - granted_at)
            for device, assignment, granted_at in store.open_assignments()
        ),
        buffer=tuple(buffered(stored) for stored in store.unmerged()),
        contributed=tuple(store.last_contributions().items()),
        paces_s=tuple(store.paces_s(pacing.KEPT).items()),
    )


def _lease(device: str, assignment: Assignment, now: float, elapsed_s: float) -> Lease:
    """A lease with what is left of its time; a clock that was put back in between takes nothing off."""
    return Lease(
        assignment=assignment.id,
        device=device,
        version=assignment.version,
        rank=assignment.rank,
        expires_at=now + max(0.0, assignment.expires_in_s - max(0.0, elapsed_s)),
        carry_rank=assignment.carry_rank,
        steps=assignment.steps,
    )


def buffered(stored: StoredUpdate) -> Buffered:
    """An update as the engine knows it."""
    return Buffered(stored.id, stored.device, stored.version, stored.update.examples)
