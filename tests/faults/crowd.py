"""Devices made of numpy that live through whatever happens to their coordinator, as real ones do.

Each is a thread over the production transport. What it has finished it keeps until that
is acknowledged or refused.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file.codec import encode, max_adapter_bytes, open_adapter
from edge_sdk.core.errors import EdgeError, OurFault, Unauthorised, Unreachable, UploadLost
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Ask, Assignment, JoinRequest
from tests.coordinator.devices import FINGERPRINT, SCALING, SHAPES, random_adapter, update_of
from tests.processes import MOST_BYTES, CoordinatorProcess

RANKS = (2, 4, 8)


class FakeDevice(threading.Thread):
    """Joins, asks, fetches its start, "trains" random factors and hands them in, over and over.

    `acknowledged`: the assignments of which it heard 202. `spoilt`: hands in what cannot be merged.
    """

    def __init__(self, crowd: Crowd, number: int, spoilt: bool = False) -> None:
        super().__init__(daemon=True)
        self.crowd, self.number, self.spoilt = crowd, number, spoilt
        self.acknowledged: list[str] = []
        self.refused: Counter[str] = Counter()
        self.chance = random.Random(number)
        self._transport: Transport | None = None
        self._outbox: tuple[Assignment, bytes] | None = None

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            while not self.crowd.stopping.is_set():
                try:
                    self._once(Path(folder))
                except (Unreachable, OurFault, UploadLost) as error:
                    self.crowd.unanswered[type(error).__name__] += 1
                    time.sleep(0.1)
                except EdgeError as error:
                    self.refused[error.title] += 1
                    self._outbox = None
                    if isinstance(error, Unauthorised):
                        self._leave()
                    time.sleep(0.03)
                self.crowd.resting.wait()
        self._leave()

    def _leave(self) -> None:
        if self._transport:
            self._transport.close()
        self._transport = None

    def _once(self, folder: Path) -> None:
        """One thing after the other; an error leaves the outbox as it is."""
        if self.spoilt and self.refused:  # it would have to wait longer each time; a new device need not
            self.refused.clear()
            self._leave()
        if self._transport is None:
            self._transport = self.crowd.join(f"device {self.number}")
        if self._outbox is None:
            answer = self._transport.ask(Ask(RANKS[self.number % 3], carry_rank=4))
            if not isinstance(answer, Assignment):
                time.sleep(min(answer.retry_after_s, 0.05))
                return
            if rank := answer.carry_rank if self.crowd.carries else answer.rank:
                self._transport.download(
                    answer.version, rank, folder / "start", dtype="int8", most_bytes=MOST_BYTES
                )
            self._outbox = answer, self._trained(answer, folder / "start")
        assignment, content = self._outbox
        path = folder / "update"
        path.write_bytes(content)
        self._transport.upload(assignment.id, path)
        if self.spoilt and self.chance.random() < 0.3:  # goes away for good with half of it sent
            self._outbox = None
            self._leave()
            return
        self._transport.deliver(assignment.id, update_of(content, assignment.rank))
        self.acknowledged.append(assignment.id)
        self._outbox = None

    def _trained(self, assignment: Assignment, start: Path) -> bytes:
        """Now and then the very bytes that another device sends, so that they share a blob.

        Where devices send states, a small step from the start: anything else would diverge.
        """
        seed = self.chance.choice([assignment.version, self.chance.randrange(1 << 30)])
        adapter = random_adapter(assignment.rank, seed, scale=0.01)
        if not self.crowd.carries:
            cap = max_adapter_bytes(SHAPES, assignment.rank)
            begun = open_adapter(start, SHAPES, assignment.rank, SCALING, cap)
            adapter = {
                name: LoraFactors(factors.b + adapter[name].b, factors.a) for name, factors in begun.modules()
            }
        if self.spoilt:
            name, factors = next(iter(adapter.items()))
            adapter[name] = LoraFactors(np.full_like(factors.b, np.nan), factors.a)
        return encode(adapter, SCALING)


class Crowd:
    """Some devices, of which the last hands in what cannot be merged."""

    def __init__(self, coordinator: CoordinatorProcess, count: int, carries: bool = False) -> None:
        self.coordinator, self.carries = coordinator, carries
        self.stopping, self.resting = threading.Event(), threading.Event()
        self.resting.set()
        self.unanswered: Counter[str] = Counter()
        self.devices = [FakeDevice(self, n, spoilt=n == count - 1) for n in range(count)]

    def __enter__(self) -> Crowd:
        for device in self.devices:
            device.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def join(self, name: str) -> Transport:
        """A new member's connection."""
        joining = Transport(self.coordinator.url, self.coordinator.join_token)
        try:
            reply = joining.join(JoinRequest(name, FINGERPRINT, {"system": "Linux"}))
        finally:
            joining.close()
        return Transport(self.coordinator.url, reply.credential)

    def rest(self) -> None:
        """Begin nothing new until `wake`."""
        self.resting.clear()

    def wake(self) -> None:
        self.resting.set()

    def stop(self) -> None:
        self.stopping.set()
        self.resting.set()
        for device in self.devices:
            device.join(60.0)
            assert not device.is_alive()

    @property
    def acknowledged(self) -> list[str]:
        return [id for device in self.devices for id in list(device.acknowledged)]
