"""Devices under load, without a model: they join, ask, download, beat, upload and deliver."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load.cases import FINGERPRINT, Template
from benchmarks.load.client import BrokenOff, Connection, Reply, Tally, head_of, json_request
from edge_sdk.core import messages
from edge_sdk.core.adapter_file.dtypes import WireDtype

FIRST_ASK_S = 0.1


@dataclass
class Device:
    """One that is enrolled. `number` makes its files different from all others."""

    number: int
    kind: Template
    credential: str
    assignment: dict[str, Any] | None = None
    delivered: int = 0

    def ask(self) -> bytes:
        """Ask for work, able to hold as many components frozen as it trains."""
        wanted = {"rank": self.kind.rank, "carry_rank": self.kind.rank}
        return json_request("POST", messages.ASSIGNMENTS, self.credential, wanted)

    def took(self, reply: Reply) -> bool:
        """Note the answer to that; whether it is work."""
        self.assignment = reply.json() if reply.status == 200 else None
        return self.assignment is not None

    def beat(self, steps: int) -> bytes:
        """A heartbeat."""
        route = messages.HEARTBEAT.format(id=self.held["id"])
        return json_request("POST", route, self.credential, {"steps_done": steps})

    def download(self, dtype: WireDtype) -> bytes | None:
        """Fetch what it is to hold frozen; None if that is nothing."""
        work = self.held
        if not work["carry_rank"]:
            return None
        place = messages.ADAPTER if dtype == "float32" else messages.ADAPTER_IN
        route = place.format(version=work["version"], rank=work["carry_rank"], dtype=dtype)
        return head_of("GET", route, self.credential)

    def offset(self) -> bytes:
        """How much of the upload is there."""
        return head_of("HEAD", messages.UPLOAD.format(id=self.held["id"]), self.credential)

    def upload(self, offset: int = 0) -> tuple[bytes | memoryview, ...]:
        """The file from `offset` on."""
        more = f"{messages.UPLOAD_OFFSET}: {offset}\r\nContent-Type: {messages.OFFSET_CONTENT_TYPE}\r\n"
        route = messages.UPLOAD.format(id=self.held["id"])
        body, tail = memoryview(self.kind.body), self.kind.tail(self.file_number)
        rest = (body[offset:], tail) if offset < len(body) else (tail[offset - len(body) :],)
        head = head_of("PATCH", route, self.credential, self.kind.size_bytes - offset, more)
        return (head, *rest)

    def update(self) -> bytes:
        """Say what was uploaded."""
        route = messages.UPDATE.format(id=self.held["id"])
        return json_request("POST", route, self.credential, self.kind.record(self.file_number))

    @property
    def held(self) -> dict[str, Any]:
        """The assignment that it has."""
        assert self.assignment is not None
        return self.assignment

    @property
    def file_number(self) -> int:
        """Which file it sends next."""
        return 1 + self.number + (self.delivered << 16)


async def join(
    connection: Connection, tally: Tally, token: str, number: int, kinds: Sequence[Template]
) -> Device:
    """Enrol a device; its type follows from its number."""
    record = {"name": f"load {number}", "fingerprint": FINGERPRINT}
    reply = await tally.timed("join", connection, json_request("POST", messages.JOIN, token, record))
    return Device(number, kinds[number % len(kinds)], reply.json()["credential"])


async def hand_in(device: Device, connection: Connection, tally: Tally) -> bool:
    """HEAD, PATCH and POST of one update; whether it was acknowledged. A cut connection is taken up again."""
    while True:
        try:
            reply = await patiently("offset", connection, tally, device.offset())
            reply = await patiently("upload", connection, tally, *device.upload(reply.offset or 0))
            if reply.status == 409:  # a cut connection's last bytes came after the offset was asked for
                continue
            reply = await patiently("update", connection, tally, device.update())
        except (BrokenOff, OSError, TimeoutError):
            await asyncio.sleep(random.uniform(0.5, 2.0))
            continue
        if reply.status == 202:
            device.delivered += 1
            device.assignment = None
        return reply.status == 202


async def patiently(route: str, connection: Connection, tally: Tally, *parts: bytes | memoryview) -> Reply:
    """Send again as long as the answer is "later", after what it asks to wait."""
    while True:
        reply = await tally.timed(route, connection, *parts, keep_body=route != "download")
        if reply.status != 503 or reply.retry_after_s is None:
            return reply
        await asyncio.sleep(reply.retry_after_s * random.uniform(1.0, 1.5))


async def take_part(device: Device, connection: Connection, tally: Tally, dtype: WireDtype) -> bool:
    """One whole assignment: ask, download, two heartbeats, upload, deliver."""
    if not device.took(await patiently("ask", connection, tally, device.ask())):
        return False
    request = device.download(dtype)
    if request:
        await patiently("download", connection, tally, request)
    for steps in (1, 10):
        await asyncio.sleep(random.uniform(0.5, 1.5))
        await patiently("heartbeat", connection, tally, device.beat(steps))
    return await hand_in(device, connection, tally)
