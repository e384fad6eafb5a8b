"""An answer that many ask for and that takes long to make: made once at a time, for all who wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FRESH_BELOW_S = 0.05  # what is made within this is made anew for everybody who asks later
SHARE = 20  # an answer serves this many times as long as it took: making it never takes over a twentieth


class SharedAnswer:
    """Belongs to one event loop. `make` runs in a worker thread."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._answer, self._asked_at, self._good_until = b"", 0.0, 0.0

    async def get(self) -> bytes:
        """The answer, no older than SHARE times what it takes to make it."""
        came_at = time.monotonic()
        async with self._making:
            # Who came before the last making began shares it; that one saw all that was known then.
            if came_at >= self._asked_at and time.monotonic() >= self._good_until:
                self._asked_at = time.monotonic()
                self._answer = await asyncio.to_thread(self._make)
                took_s = time.monotonic() - self._asked_at
                self._good_until = self._asked_at + (SHARE * took_s if took_s > FRESH_BELOW_S else 0.0)
        return self._answer
