"""Requests that were refused: each is counted, and a flood of them costs the log a line a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.system.terminal import logger

log = logger("coordinator")
AGAIN_S = 60.0
SHOWN = 300  # characters of what was wrong


@dataclass
class _Held:
    """What the log has not said yet of one kind."""

    said_at: float
    more: int = 0
    last: str = ""  # who sent it


class Refusals:
    """Counts what strangers and members send in vain. For any thread. `clock`: seconds that never go back.

    The first of a kind is a line of its own. Those that follow within a minute share one, which `flush` says.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._count = 0

    @property
    def count(self) -> int:
        """How many there were, of all kinds, since the start."""
        return self._count

    def add(self, kind: str, sender: str, what: str) -> None:
        """Count one more.

        Args:
            kind: one of a few constant words.
            sender: the address that it came from.
            what: the request, and what was wrong with it; a stranger may have written it.
        """
        now = self._clock()
        with self._lock:
            self._count += 1
            held = self._held.get(kind)
            if held and (held.more or now - held.said_at < AGAIN_S):
                held.more, held.last = held.more + 1, sender
                return
            self._held[kind] = _Held(now)
        log.warning("refused (%s) from %s: %s", kind, sender, what[:SHOWN])

    def flush(self, everything: bool = False) -> None:
        """Say how many more there were of the kinds whose minute is over, or of all."""
        now, due = self._clock(), []
        with self._lock:
            for kind, held in self._held.items():
                if held.more and (everything or now - held.said_at >= AGAIN_S):
                    due.append((kind, held.more, held.last))
                    self._held[kind] = _Held(now)
        for kind, more, last in due:
            log.warning("refused (%s): … and %d more in the last minute, the last from %s", kind, more, last)
