"""The audit log: who joined, who tried to, what the host did and who looked. With addresses, without secrets.

The same from the same address within a minute is one entry with a count, so a flood of wrong tokens costs the
disk an entry a minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from coordinator.storage.members import Members
from coordinator.storage.rows import AuditEntry

AGAIN_S = 60.0
MOST_KEYS = 10_000  # that are told apart within a minute; what comes beyond them is counted together
SHOWN = 300  # characters of a detail
_Key = tuple[str, str, str]


class Trail:
    """Keeps entries until `flush` writes them. For any thread. `clock`: seconds that never go backwards."""

    def __init__(self, members: Members, clock: Callable[[], float] = time.monotonic) -> None:
        self._members, self._clock = members, clock
        self._lock = threading.Lock()
        self._due: list[AuditEntry] = []
        self._said: dict[_Key, tuple[float, AuditEntry | None]] = {}  # since when; what came again

    def add(self, what: str, device: str = "", address: str = "", detail: str = "") -> None:
        """Note one thing that happened just now. `detail` may be a stranger's; it holds no secret."""
        now, key = self._clock(), (what, device, address)
        entry = AuditEntry(time.time(), what, device, address, detail[:SHOWN])
        with self._lock:
            if key not in self._said and len(self._said) >= MOST_KEYS:
                key, entry = (what, "", ""), replace(entry, device="", address="many addresses")
            since, again = self._said.get(key, (None, None))
            if since is None:
                self._said[key] = now, None
                self._due.append(entry)
            else:
                times = again.times + 1 if again else 1
                self._said[key] = since, replace(entry, times=times)

    def flush(self, everything: bool = False) -> None:
        """Write what is due, in one transaction; what fails is written with the next."""
        now = self._clock()
        with self._lock:
            for key, (since, again) in list(self._said.items()):
                if everything or now - since >= AGAIN_S:
                    del self._said[key]
                    if again:
                        self._due.append(again)
                        self._said[key] = now, None
            due, self._due = self._due, []
        try:
            if due:
                self._members.note(due)
        except BaseException:
            with self._lock:
                self._due[:0] = due
            raise
