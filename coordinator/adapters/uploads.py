"""Adapters on their way in: how large they may be, what is checked, and when one is on disk for good."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

from coordinator.adapters.examination import Examination
from coordinator.merging.parallel import cores
from coordinator.storage.blobs import Blobs
from coordinator.storage.disk import blaming
from coordinator.storage.rows import StoredUpdate
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, ProtocolError, StaleUpdate, TooLarge
from edge_sdk.core.messages import Assignment, Federation, Update


class Uploads:
    """What devices hand in. Methods that read or write files are for a worker thread."""

    def __init__(self, federation: Federation, store: Store, blobs: Blobs, examination: Examination) -> None:
        self._store, self._blobs, self._examination = store, blobs, examination
        # More at a time would hold more in memory, and hand the interpreter around.
        self._checks = threading.Semaphore(cores())
        # Asked for at every piece of an upload; adding up 224 modules takes 0.4 ms.
        modules, dtype = federation.base.modules, federation.upload_dtype
        self._cap_of_rank = functools.cache(lambda rank: codec.max_adapter_bytes(modules, rank, dtype))

    def cap(self, assignment: Assignment) -> int:
        """The most bytes that the adapter of this assignment can have in the federation's dtype.

        It may come in another that takes no more.
        """
        return self._cap_of_rank(assignment.rank)

    def require_fits(self, assignment: Assignment, size_bytes: int) -> None:
        """Raise TooLarge for more bytes than the rank of an assignment needs."""
        cap = self.cap(assignment)
        if size_bytes > cap:
            raise TooLarge(f"the upload exceeds the {cap} bytes that its rank needs")

    def append(self, assignment: Assignment, offset: int, pieces: Sequence[bytes]) -> int:
        """Store pieces of an upload at `offset`, where what is stored of it must end; the new end.

        Raises:
            OffsetConflict: bytes are missing before `offset`, or there already.
            TooLarge: the upload would be larger than its rank needs; nothing is written.
            DiskFull, InternalError: some may be stored; `stored_bytes` says how much.
        """
        return self._blobs.append(assignment.id, offset, pieces, self.cap(assignment))

    def stored_bytes(self, id: str) -> int:
        """How much of an upload is here. A device that heard no acknowledgement need not send it again."""
        return self._blobs.offset(id) or self._store.update_bytes(id)

    def is_known(self, id: str, update: Update) -> bool:
        """Whether this very update was acknowledged before; what was sent again of it is dropped.

        Raises:
            StaleUpdate: it was, and then left out.
            ProtocolError: another adapter was.
        """
        known = self._store.update_digest(id)
        if known is None:
            return False
        if known != update.digest:
            raise ProtocolError(f"assignment {id} was delivered before, with digest {known[:12]}")
        if reason := self._store.rejection(id):
            raise StaleUpdate(f"this update was left out: {reason}")
        self._blobs.discard(id)  # a device that heard no answer has sent it all again
        return True

    def check_claims(self, assignment: Assignment, update: Update) -> None:
        """Raise ProtocolError or TooLarge for a record that cannot be true."""
        if not 1 <= update.rank <= assignment.rank:  # lower where the device's memory did not suffice
            raise ProtocolError(f"Update.rank: {update.rank}, but rank {assignment.rank} was assigned")
        if update.examples < 1 or update.size_bytes < 1:
            raise ProtocolError("Update.examples and Update.size_bytes must be 1 or more")
        if not 1 <= update.steps <= assignment.steps:
            raise ProtocolError(f"Update.steps must be 1 to {assignment.steps}, as many as were assigned")
        cap = self.cap(assignment)
        if update.size_bytes > cap:
            raise TooLarge(f"Update.size_bytes: {update.size_bytes} exceeds the {cap} that its rank needs")

    def take_in(self, device: str, assignment: Assignment, update: Update) -> tuple[StoredUpdate, bool]:
        """`check_adapter` and `keep`, without a hand-over between threads in the middle.

        Returns:
            What was checked, and whether it is new here.
        """
        with self._checks:
            stored = self.check_adapter(device, assignment, update)
        return stored, self.keep(stored)

    def check_adapter(self, device: str, assignment: Assignment, update: Update) -> StoredUpdate:
        """Shapes, dtypes and values of the whole upload, and the norm of what the device changed.

        A bad adapter is dropped and never becomes a blob: blobs are shared by content, so that none may be
        deleted for the sake of one device.

        Returns:
            What to keep: the update, its norm, and how much of it is merged.

        Raises:
            AdapterError, TooLarge: it cannot be merged; names tensor or module.
        """
        with self._blobs.pins.hold(update.digest):
            path = self._blobs.whole(assignment.id, update.digest)
            try:
                with blaming(f"{path.parent.name}/{path.name}"):
                    return self._examination.examine(device, assignment, update, path, self.cap(assignment))
            except (AdapterError, TooLarge):
                self._blobs.discard(assignment.id)
                raise

    def keep(self, stored: StoredUpdate) -> bool:
        """Acknowledge a checked update: once this returns it is on disk. False if it was before."""
        with self._blobs.pins.hold(stored.update.digest):  # between the two steps no row needs the blob
            self._blobs.finish(stored.id, stored.update.digest)
            return self._store.add_update(stored, time.time())
