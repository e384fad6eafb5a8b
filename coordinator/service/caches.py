"""What nearly every request asks of the store, kept in memory: whose a credential or an assignment is.

A credential costs some 150 bytes. Assignments never change once they are granted, so that any that is kept is
right; the ones used last are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordinator.storage.store import Store
from edge_sdk.core.messages import Assignment

ASSIGNMENTS = 8192  # kept; each takes about a kilobyte


class Credentials:
    """Hash of a credential -> device, but for revoked ones."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._data_version = store.data_version()
        self._devices = store.credentials()

    def __len__(self) -> int:
        """How many devices may still take part."""
        return len(self._devices)

    def device_of(self, credential_hash: str) -> str | None:
        """The device that holds it."""
        return self._devices.get(credential_hash)

    def add(self, credential_hash: str, device: str) -> None:
        """One that was stored just now."""
        self._devices[credential_hash] = device

    def refresh(self) -> None:
        """Read them again if another process has written to the store. In a worker thread: this may wait."""
        data_version = self._store.data_version()
        if data_version != self._data_version:
            self._data_version, self._devices = data_version, self._store.credentials()


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
