"""What nearly every request asks of the store, kept in memory: whose an assignment is.

Assignments never change once they are granted, so that any that is kept is right; the ones used last are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordinator.storage.store import Store
from edge_sdk.core.messages import Assignment

ASSIGNMENTS = 8192  # kept; each takes about a kilobyte


class Assignments:
    """Assignments by id, open or not."""

    def __init__(self, store: Store, kept: int = ASSIGNMENTS) -> None:
        self._store, self._kept = store, kept
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, Assignment]] = OrderedDict()

    def of(self, id: str, device: str) -> Assignment | None:
        """The assignment of this device with this id."""
        with self._lock:
            found = self._known.get(id)
            if found:
                self._known.move_to_end(id)
        if found:
            return found[1] if found[0] == device else None
        stored = self._store.assignment(id, device)
        if stored:
            self.add(device, stored)
        return stored

    def add(self, device: str, assignment: Assignment) -> None:
        """One that is stored."""
        with self._lock:
            self._known[assignment.id] = device, assignment
            if len(self._known) > self._kept:
                self._known.popitem(last=False)
