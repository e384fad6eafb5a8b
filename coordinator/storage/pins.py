"""Names of files that somebody is using, so that collection leaves them alone.

An upload becomes a blob before its row says so, and two uploads of equal bytes share one blob. Whoever is
between the two steps holds a pin on the name; what holds none, and is named by no row, can go. The question
and the removal are one step to everybody else.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator


class Pins:
    """Which names are in use, and which are being removed. For any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: Counter[str] = Counter()
        self._going: set[str] = set()

    @contextlib.contextmanager
    def hold(self, *names: str) -> Iterator[None]:
        """Keep these from being removed while the block runs; waits for a removal that has begun."""
        with self._changed:
            self._changed.wait_for(lambda: self._going.isdisjoint(names))
            self._held.update(names)
        try:
            yield
        finally:
            with self._changed:
                self._held.subtract(names)
                self._held += Counter()  # drops what nobody holds any more

    def remove(self, name: str, is_needed: Callable[[], bool], remove: Callable[[], None]) -> bool:
        """Call `remove` unless somebody holds the name or, asked when nobody does, it `is_needed`.

        Returns:
            Whether it was removed.
        """
        with self._changed:
            if self._held[name] or name in self._going or is_needed():
                return False
            self._going.add(name)
        try:
            remove()
        finally:
            with self._changed:
                self._going.discard(name)
                self._changed.notify_all()
        return True
