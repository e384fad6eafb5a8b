"""Token buckets: so much at once, and then so much a second."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

KEPT = 65536  # keys of one kind; of a million that take one token each the oldest are full again anyway


class Buckets:
    """One bucket for each key, full at first. Belongs to one thread.

    Args:
        most: what a full bucket holds.
        per_s: what flows in.
        clock: seconds that never go backwards.
    """

    def __init__(self, most: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._per_s, self._clock = most, per_s, clock
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what there was, and when

    def take(self, key: str, count: float = 1.0) -> float:
        """Take so many; 0, or the seconds until there are enough, and then none are taken."""
        there, now = self._there(key)
        if there < min(count, self._most):
            return (min(count, self._most) - there) / self._per_s
        self._put(key, there - count, now)
        return 0.0

    def wait_s(self, key: str) -> float:
        """Seconds until anything worth asking for is there again, a second at least; 0 if anything is."""
        there, _ = self._there(key)
        return max(1.0, -there / self._per_s) if there <= 0.0 else 0.0

    def charge(self, key: str, count: float) -> None:
        """Take what is used up already, though that leaves less than nothing."""
        there, now = self._there(key)
        self._put(key, max(-self._most, there - count), now)

    def fill(self, key: str) -> None:
        """Forget what was taken."""
        self._held.pop(key, None)

    def _there(self, key: str) -> tuple[float, float]:
        now = self._clock()
        there, since = self._held.get(key, (self._most, now))
        return min(self._most, there + (now - since) * self._per_s), now

    def _put(self, key: str, there: float, now: float) -> None:
        self._held[key] = there, now
        self._held.move_to_end(key)
        if len(self._held) > KEPT:
            self._held.popitem(last=False)
