"""Adapters on their way in: how large they may be, what is checked, and when one is on disk for good."""

from __future__ import annotations

import time

from coordinator.blobs import Blobs
from coordinator.store import Store, StoredUpdate
from edge_sdk.core import codec
from edge_sdk.core.errors import AdapterError, ProtocolError, TooLarge
from edge_sdk.core.messages import Assignment, Federation, Update

# Of the product B̃·A of one module. No training comes near it; a sum of many such still fits in float32, so
# that nobody can make the global adapter overflow.
MAX_NORM = 1e6


class Uploads:
    """What devices hand in. Methods that read or write files are for a worker thread."""

    def __init__(self, federation: Federation, store: Store, blobs: Blobs) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs

    def cap(self, assignment: Assignment) -> int:
        """The most bytes that the adapter of this assignment can have."""
        return codec.max_adapter_bytes(self._federation.base.modules, assignment.rank)

    def is_known(self, id: str, update: Update) -> bool:
        """Whether this very update was acknowledged before; what was sent again of it is dropped."""
        if self._store.update_digest(id) != update.digest:
            return False
        self._blobs.discard(id)  # a device that heard no answer has sent it all again
        return True

    def check_claims(self, assignment: Assignment, update: Update) -> None:
        """Raise ProtocolError or TooLarge for a record that cannot be true."""
        if not 1 <= update.rank <= assignment.rank:  # lower where the device's memory did not suffice
            raise ProtocolError(f"Update.rank: {update.rank}, but rank {assignment.rank} was assigned")
        if update.examples < 1 or update.steps < 1:
            raise ProtocolError("Update.examples and Update.steps must be 1 or more")
        cap = self.cap(assignment)
        if update.size_bytes > cap:
            raise TooLarge(f"Update.size_bytes: {update.size_bytes} exceeds the {cap} that its rank needs")

    def check_adapter(self, assignment: Assignment, update: Update) -> None:
        """Shapes, dtypes and values of the whole upload. A bad one is dropped and never becomes a blob:

        blobs are shared by content, so that none may be deleted for the sake of one device.
        """
        federation = self._federation
        path = self._blobs.whole(assignment.id, update.digest)
        try:
            cap = self.cap(assignment)
            file = codec.open_adapter(path, federation.base.modules, update.rank, federation.scaling, cap)
            if not any(
                r == min(update.rank, *federation.base.modules[name]) for name, r in file.ranks.items()
            ):
                raise AdapterError(f"no module has rank {update.rank}, which Update.rank says")
            for name, factors in file.modules():
                if not factors.norm() <= MAX_NORM:
                    raise AdapterError(f"module {name} has norm {factors.norm():.3g}, above {MAX_NORM:g}")
        except (AdapterError, TooLarge):
            self._blobs.discard(assignment.id)
            raise

    def keep(self, stored: StoredUpdate) -> bool:
        """Acknowledge a checked update: once this returns it is on disk. False if it was before."""
        self._blobs.finish(stored.id, stored.update.digest)
        return self._store.add_update(stored, time.time())
