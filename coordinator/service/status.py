"""The federation at a glance, for its host and its devices; made once at a time, for all who ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from coordinator.engine.engine import Engine
from coordinator.privacy.ledger import Spending
from coordinator.storage.members import ABSENT
from coordinator.storage.rows import Device
from coordinator.storage.store import Store
from edge_sdk.core.messages import DeviceStatus, Federation, Status
from edge_sdk.core.records import encode

Made = TypeVar("Made")
NEWEST = 20  # versions that are shown
FRESH_BELOW_S = 0.05  # an answer that takes no longer than this is made anew for each later request
SHARE = 20  # an answer serves this many times as long as it took: making it never takes over a twentieth


class Overview:
    """What the engine knows of this moment, and the store of what was before."""

    def __init__(self, federation: Federation, engine: Engine, store: Store) -> None:
        self._federation, self._engine, self._store = federation, engine, store

    def status(
        self, seen_s_ago: Mapping[str, float], norm_bound: float | None, spent: Spending | None
    ) -> Status:
        """The record. A device that is not in `seen_s_ago` was not heard of since the start: 0."""
        state, versions = self._engine.state, self._store.versions(NEWEST)
        enrolled = self._store.members.devices()
        return Status(
            federation=self._federation.id,
            version=state.version,
            start=self._store.start(state.version),
            buffered=len(state.buffer),
            buffer_size=self._engine.policy.buffer_size,
            aggregating=state.phase == "merging",
            version_ranks={str(v.version): v.rank for v in versions},
            discarded_shares={str(v.version): v.discarded_share for v in versions},
            devices=tuple(
                self._device(device, seen_s_ago.get(device.id, 0.0))
                for device in enrolled
                if device.standing not in ABSENT
            ),
            refused=sum(device.refused for device in enrolled),
            clipped=self._store.clipped(),
            norm_bound=norm_bound,
            epsilon=spent.epsilon if spent else 0.0,
            delta=spent.delta if spent else 0.0,
        )

    def _device(self, device: Device, seen_s_ago: float) -> DeviceStatus:
        """One device; work whose lease has expired goes on."""
        seat = self._engine.state.seats.get(device.id)
        lease = seat.lease if seat else None
        return DeviceStatus(
            id=device.id,
            name=device.name,
            rank=device.rank,
            updates=device.updates,
            mean_staleness=device.mean_staleness,
            state="training" if lease else "idle",
            steps_done=lease.steps_done if lease else 0,
            steps=lease.steps if lease else 0,
            seen_s_ago=seen_s_ago,
        )


def pages(status: Status, devices: int) -> tuple[bytes, ...]:
    """The record as JSON, in pages of so many devices; one if there are none."""
    count = max(1, -(-len(status.devices) // devices))
    return tuple(
        encode(replace(status, devices=status.devices[k * devices :][:devices], page=k, pages=count))
        for k in range(count)
    )


class SharedAnswer(Generic[Made]):
    """An answer that takes long to make: made once at a time, for all who wait. Belongs to one event loop.

    `make` runs in a worker thread.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._answer: Made | None = None
        self._asked_at = self._good_until = 0.0

    async def get(self) -> Made:
        """The answer, no older than SHARE times what it takes to make it."""
        came_at = time.monotonic()
        async with self._making:
            # Who came before the last making began shares it; that one saw all that was known then.
            old = came_at >= self._asked_at and time.monotonic() >= self._good_until
            if (answer := self._answer) is None or old:
                self._asked_at = time.monotonic()
                answer = self._answer = await asyncio.to_thread(self._make)
                took_s = time.monotonic() - self._asked_at
                self._good_until = self._asked_at + (SHARE * took_s if took_s > FRESH_BELOW_S else 0.0)
        return answer
