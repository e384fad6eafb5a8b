"""Devices that have worked with another coordinator of this federation: a copy of its folder, most likely.

Each start of a coordinator has a name, which devices keep and bring along. One that no start of this folder
ever had was given out by a coordinator on a copy, or by this folder before an older backup was put in its
place. The first is a mistake that splits a federation in two, the second a rescue, and nothing here can tell
which it was; so the host and the device's owner are told, and work goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from coordinator.service.fault_log import FaultLog
from coordinator.storage.store import Store
from edge_sdk.core.errors import OurFault
from edge_sdk.system.terminal import logger

log = logger("coordinator")
AGAIN_S = 3600.0


def worked_elsewhere(run: str) -> str:
    """What is said of a device that came with this run."""
    return (
        f"has worked with another coordinator of this federation (run {run}): a copy of this folder runs, or "
        "this one was restored from an older backup"
    )


class OtherRuns:
    """What was said of which device when. Belongs to one event loop.

    `clock`: seconds that never go backwards.
    """

    def __init__(self, store: Store, faults: FaultLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._faults, self._clock = store, faults, clock
        self._ours = store.run_names()
        self._said: dict[str, float] = {}

    async def heard(self, device: str, run: str) -> bool:
        """Whether the run that a device came with is of another coordinator; says so once an hour for each.

        A device that comes with none, because it never had any, is not one of those.
        """
        if not run or run in self._ours:
            return False
        said, now = self._said.get(device), self._clock()
        if said is None or now - said >= AGAIN_S:
            self._said[device] = now
            log.warning("device %s %s", device, worked_elsewhere(run))
            try:
                await asyncio.to_thread(self._store.note_elsewhere, device, run)
            except OurFault as error:  # a word less for the host; the device gets its work
                self._faults.log("other runs", error)
        return True
