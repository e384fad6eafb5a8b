"""What a coordinator does without being asked: ticks, merges, the collection of files, expired leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from coordinator.engine.events import (
    Decline,
    Effect,
    Event,
    Expired,
    Merge,
    Merged,
    MergeFailed,
    Published,
    Revert,
    RevertWanted,
    Tick,
)
from coordinator.service.fault_log import FaultLog
from coordinator.storage.rows import Version
from coordinator.storage.store import Store
from coordinator.upkeep.collection import Collector
from edge_sdk.core.errors import BadUpdates, InputError, OurFault
from edge_sdk.system.heap import trim_heap
from edge_sdk.system.terminal import logger

log = logger("coordinator")
TICK_S = 0.5


class Background:
    """Belongs to one event loop; what blocks runs in worker threads.

    Args:
        store: of the federation.
        make_version: makes and publishes one, in a thread.
        collector: removes files, in a thread.
        faults: where faults of the machine are said.
        tell: gives the engine an event, and brings back here what is to be done about it.
        note_version: called in a thread with each version, once it is in the store and before anything is
            collected for it.
    """

    def __init__(
        self,
        store: Store,
        make_version: Callable[[Merge | Revert], Version],
        collector: Collector,
        faults: FaultLog,
        tell: Callable[[Event[None]], None],
        note_version: Callable[[int], None],
    ) -> None:
        self._store, self._make_version, self._collector = store, make_version, collector
        self._faults, self._tell, self._note_version = faults, tell, note_version
        self._tasks: set[asyncio.Task[None]] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._declined: dict[str, str] = {}  # updates that are not left out on disk yet, and why
        self._expired: list[str] = []  # assignments whose end is not on disk yet

    def take_up(self, effects: Iterable[Effect]) -> None:
        """Begin what the engine wants done."""
        for effect in effects:
            if isinstance(effect, Decline):
                self._declined[effect.update] = str(effect.error)
            elif isinstance(effect, Merge | Revert):
                self._begin(self._merge(effect))
            elif isinstance(effect, Expired):
                log.info("assignment %s of %s expired", effect.lease.assignment, effect.lease.device)
                self._expired.append(effect.lease.assignment)
            elif isinstance(effect, Published):
                self._collect_soon()

    async def run(self, every_tick: Callable[[], Awaitable[None]]) -> None:
        """Tick until cancelled, whatever fails: deadlines must come."""
        self._collect_soon()
        while True:
            try:
                self._tell(Tick())
                await self._note_expired()
                await self._note_declined()
                await every_tick()
                if (to := await asyncio.to_thread(self._store.wanted_revert)) is not None:
                    self._tell(RevertWanted(to))
            except OurFault as error:
                self._faults.log("tick", error)
            except Exception:
                log.exception("a tick failed; the next comes in %.1f s", TICK_S)
            await asyncio.sleep(TICK_S)

    async def close(self) -> None:
        """Wait for what is under way, a merge above all."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _note_declined(self) -> None:
        """Leave out for good what had been taken in and counts no more; what fails is noted with the next."""
        if declined := dict(self._declined):
            await asyncio.to_thread(self._store.reject_updates, declined)
            for update in declined:
                del self._declined[update]

    async def _note_expired(self) -> None:
        """Close the leases that ran out, all in one commit; what fails is noted with the next."""
        if expired := list(self._expired):
            await asyncio.to_thread(self._store.close_assignments, expired)
            del self._expired[: len(expired)]

    async def _merge(self, effect: Merge | Revert) -> None:
        """Make a version off the event loop, and tell the engine how it went, whatever happened."""
        started = time.monotonic()
        outcome: Merged | MergeFailed
        try:
            outcome = await asyncio.to_thread(self._merged, effect)
        except OurFault as error:
            log.error("version %d: %s; its updates are kept for the next try", effect.version, error)
            outcome = MergeFailed()
        except Exception:
            log.exception("making version %d failed; its updates are kept for the next try", effect.version)
            outcome = MergeFailed()
        if isinstance(outcome, Merged):
            took_s = time.monotonic() - started
            if isinstance(effect, Merge):
                count, rank = len(effect.weights), outcome.rank
                log.info("version %d: %d updates, rank %d, %.1f s", outcome.version, count, rank, took_s)
            else:
                log.info("version %d is what version %d was, as the host wanted", effect.version, effect.to)
        self._tell(outcome)

    def _merged(self, effect: Merge | Revert) -> Merged | MergeFailed:
        """A version in a worker thread. Updates that turn out to be damaged are left out for good."""
        try:
            version = self._make_version(effect)
        except InputError as error:  # what the host wanted cannot be done
            log.error("version %d: %s; this wish is dropped", effect.version, error)
            self._store.want_revert(None)
            return MergeFailed()
        except BadUpdates as error:
            for update, reason in error.reasons.items():
                log.error("update %s: %s; it is left out", update, reason)
            self._store.reject_updates(error.reasons)
            return MergeFailed(tuple(error.reasons))
        except Exception:
            # The disk may have said no to a commit that it had done.
            if (there := self._store.version(effect.version)) is None:
                raise
            version = there
        finally:
            trim_heap()
        try:
            self._note_version(version.version)
        except OurFault as error:
            self._faults.log(f"version {version.version}", error)
        return Merged(version.version, version.rank, version.reverts_to)

    def _collect_soon(self) -> None:
        """Remove files that nobody needs any more, off the event loop, unless that is under way."""
        if self._collecting is None or self._collecting.done():
            self._collecting = self._begin(self._collect())

    async def _collect(self) -> None:
        try:
            found = await asyncio.to_thread(self._collector.run)
        except OurFault as error:
            self._faults.log("collection", error)
        else:
            if found.files:
                log.info("collected %s", found)
