"""When a run writes its checkpoint. Where the disk is full it trains on, and tries again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edge_sdk.core.errors import Unwritable
from edge_sdk.system.backoff import Backoff

log = logging.getLogger(__name__)


class Keeping:
    """The checkpoint of one run.

    Args:
        write: writes it; None for a run that keeps none.
        every_s: how often.

    Attributes:
        trouble: why the last attempt failed; "" if it did not.
    """

    def __init__(self, write: Callable[[], None] | None, every_s: float) -> None:
        self._write, self._every_s = write, every_s
        self._due = time.monotonic() + every_s
        self._backoff = Backoff()
        self.trouble = ""

    def if_due(self) -> None:
        """Write it if it is time."""
        if self._write and time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        """Write it. Where that fails, the one before counts, and it is due again soon."""
        if self._write is None:
            return
        wait_s = self._every_s
        try:
            self._write()
            self.trouble = ""
            self._backoff.reset()
        except Unwritable as error:
            if not self.trouble:
                log.warning("%s; the checkpoint before counts", error)
            self.trouble = str(error)
            wait_s = self._backoff.next_s()
        self._due = time.monotonic() + wait_s
