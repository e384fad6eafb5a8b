"""What went wrong lately in taking part: how long to wait before the next attempt, and what is told of it."""

from __future__ import annotations

from edge_sdk.callbacks import Teller
from edge_sdk.core.errors import EdgeError, Unwritable
from edge_sdk.system.backoff import Backoff, asked_by, within_reason


class Setbacks:
    """Failures in a row, until something goes well.

    Args:
        tell: hears of each failure; of a disk that is full once, however long it lasts.
    """

    def __init__(self, tell: Teller) -> None:
        self._tell = tell
        self._backoff = Backoff()
        self._full = False  # whether a file could not be written the last time

    def failed_s(self, error: EdgeError) -> float:
        """How long to wait after `error`: what the other side asks for, or twice as long as the last time."""
        wait_s = self._backoff.next_s(asked_by(error))
        if not isinstance(error, Unwritable):
            self._tell("offline", f"{error}; trying again in {wait_s:.0f} s")
        elif not self._full:
            self._full = True
            self._tell("disk", f"{error}; it goes on by itself then")
        return wait_s

    def refused_s(self) -> float:
        """How long to wait after work that was given up: what made it worthless may not be over."""
        return self._backoff.next_s()

    def asked_s(self, retry_after_s: float) -> float:
        """How long to wait where nothing failed and the coordinator asks for some time."""
        return self._backoff.spread_s(within_reason(retry_after_s))

    def over(self) -> None:
        """Something went well: the next failure waits little again."""
        self._backoff.reset()
        if self._full:
            self._full = False
            self._tell("disk", "the state folder can be written again")
