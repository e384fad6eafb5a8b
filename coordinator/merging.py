"""A merge on disk: find the files that it needs, aggregate them, and publish the version."""

from __future__ import annotations

import time
from pathlib import Path

from coordinator import aggregation
from coordinator.blobs import Blobs
from coordinator.engine import Merge
from coordinator.rules import RULES
from coordinator.store import Store, StoredUpdate, Version
from edge_sdk.core.errors import NotFound
from edge_sdk.core.messages import Federation


class Merger:
    """Does what the engine's Merge says. For a worker thread."""

    def __init__(self, federation: Federation, store: Store, blobs: Blobs) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs

    def merge(self, effect: Merge, eta: float) -> Version:
        """Aggregate and publish; after this returns the version is durable.

        Raises:
            BadUpdate: an update cannot be read back; nothing was published.
        """
        records = {stored.id: stored for stored in self._store.unmerged()}
        addends = [self._addend(records[b.update], weight) for b, weight, _ in effect.weights]
        base = aggregation.Start(effect.version - 1, self._version(effect.version - 1))
        outcome = aggregation.aggregate(self._federation, eta, base, addends, self._blobs)
        version = Version(
            effect.version,
            outcome.digest,
            outcome.rank,
            outcome.energy,
            outcome.discarded_energy,
            time.time(),
        )
        self._store.publish(version, [(b.update, weight, tau) for b, weight, tau in effect.weights])
        return version

    def _addend(self, stored: StoredUpdate, weight: float) -> aggregation.Addend:
        """An update on disk; with what it was trained from where the rule cannot do without."""
        assignment = self._store.assignment(stored.id, stored.device)
        if assignment is None:
            raise NotFound(f"update {stored.id} has no assignment of device {stored.device}")
        path, rank = self._blobs.path(stored.update.digest), stored.update.rank
        version = self._store.version(stored.version)
        live = version.rank if version else 0
        needed = live > 0 and RULES[self._federation.rule].needs_start(rank, assignment.carry_rank, live)
        start = aggregation.Start(stored.version, self._version(stored.version) if needed else None)
        return aggregation.Addend(stored.id, weight, path, rank, start, assignment.carry_rank)

    def _version(self, number: int) -> Path | None:
        stored = self._store.version(number)
        return self._blobs.path(stored.digest) if stored else None
