"""SHA-256 of uploads worked out while their bytes come in, so that a whole one need not be read again.

Only ever a saving: what is not known here, after a restart or with very many uploads at a time, is worked out
from the file.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

KEPT = 4096  # uploads under way; each takes some hundred bytes


class RunningDigests:
    """Upload id -> the hash of its first so many bytes. Each is extended by one thread at a time."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._running: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def extend(self, id: str, offset: int, pieces: Sequence[bytes]) -> None:
        """Note that these bytes now follow the first `offset` ones; ignored where those are not known."""
        with self._lock:
            hashed, end = self._running.pop(id, (None, 0))
        if offset == 0:
            hashed, end = hashlib.sha256(), 0
        if hashed is None or end != offset:
            return
        for piece in pieces:
            hashed.update(piece)
            end += len(piece)
        with self._lock:
            self._running[id] = hashed, end
            if len(self._running) > self._kept:
                self._running.popitem(last=False)

    def of(self, id: str, size_bytes: int) -> str | None:
        """The digest in hex, if it is known of exactly so many bytes."""
        with self._lock:
            hashed, end = self._running.get(id, (None, 0))
        return str(hashed.hexdigest()) if hashed is not None and end == size_bytes else None

    def forget(self, id: str) -> None:
        """The upload is over."""
        with self._lock:
            self._running.pop(id, None)
