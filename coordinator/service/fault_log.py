"""Faults of the host's own machine in the log: one line when one comes up, not one for every request."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_sdk.core.errors import OurFault
from edge_sdk.system.terminal import logger

log = logger("coordinator")
AGAIN_S = 60.0


class FaultLog:
    """What was said when. `clock`: seconds that never go backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[tuple[str, str], float] = {}

    def log(self, what: str, error: OurFault) -> None:
        """Log an error that kept `what` from being done, unless the like was said within the last minute."""
        key, now = (what, error.title), self._clock()
        said = self._said.get(key)
        if said is None or now - said >= AGAIN_S:
            self._said[key] = now
            log.error("%s: %s", what, error)
