"""Connections that cost a coordinator as much as they can, each in one of ten ways, over and over.

    python -m benchmarks.load.hostile_peers PORT JOIN_TOKEN CONNECTIONS SECONDS

Strangers and members by turns; prints as JSON how often each way was tried. What comes back is not looked at,
and a connection that is closed is opened again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from benchmarks.load.cases import FINGERPRINT, TYPES
from benchmarks.load.client import Connection, head_of, json_request
from edge_sdk.core import messages

BOMB = gzip.compress(b"\x00" * (64 << 20), 9)
RANKS = sorted({kind.largest for kind in TYPES})
AGAIN_S = 0.1  # before a connection that was closed is opened again
DRIP_S = 0.5


@dataclass
class Peer:
    """One hostile connection; `number` tells it from the others."""

    number: int
    port: int
    join_token: str
    tried: Counter[str] = field(default_factory=Counter)
    credential: str = ""

    async def live(self) -> None:
        """Do the same for ever."""
        name, way = list(WAYS.items())[self.number % len(WAYS)]
        while True:
            line = Connection(self.port)
            try:
                self.tried[name] += 1
                await way(self, line)
            except (OSError, TimeoutError, ValueError, KeyError):
                pass
            finally:
                line.close()
            await asyncio.sleep(AGAIN_S)

    async def join(self, line: Connection) -> None:
        """Be a member, if it is not one already."""
        while not self.credential:
            record = {"name": f"hostile {self.number}", "fingerprint": FINGERPRINT}
            reply = await line.send(json_request("POST", messages.JOIN, self.join_token, record))
            if reply.status == 201:
                self.credential = reply.json()["credential"]
            else:
                await asyncio.sleep(reply.retry_after_s or 1.0)

    async def work(self, line: Connection, rank: int) -> str | None:
        """The id of an assignment; None if there is none now."""
        await self.join(line)
        wanted = {"rank": rank, "carry_rank": rank}
        reply = await line.send(json_request("POST", messages.ASSIGNMENTS, self.credential, wanted))
        return str(reply.json()["id"]) if reply.status == 200 else None


async def unread(peer: Peer, line: Connection) -> None:
    """Ask for files and for records, and take nothing of them until it is cut."""
    await peer.join(line)
    file = messages.ADAPTER.format(version=0, rank=max(RANKS))
    asked = head_of("GET", file, peer.credential) + head_of("GET", messages.FEDERATION, peer.join_token)
    await without_reading(peer.port, asked * 20)


async def piled_up(peer: Peer, line: Connection) -> None:
    """Send requests as long as anybody takes them."""
    await without_reading(peer.port, head_of("GET", messages.OPENAPI, "x" * 2000) * 50)


async def without_reading(port: int, asked: bytes) -> None:
    """Send again and again; ends when the other side hangs up."""
    loop = asyncio.get_running_loop()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        await loop.sock_connect(made, ("127.0.0.1", port))
        while True:
            await loop.sock_sendall(made, asked)
            await asyncio.sleep(0)


async def silent(peer: Peer, line: Connection) -> None:
    """Say nothing until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
    try:
        await reader.read()
    finally:
        writer.close()


async def dripping(peer: Peer, line: Connection) -> None:
    """A head that never ends."""
    await line.send_only(b"GET /v1/status HTTP/1.1\r\nX: ")
    while True:
        await line.send_only(b"x")
        await asyncio.sleep(DRIP_S)


async def announced(peer: Peer, line: Connection) -> None:
    """An upload of which nothing comes but its head."""
    assignment = await peer.work(line, random.choice(RANKS))
    if assignment:
        more = f"{messages.UPLOAD_OFFSET}: 0\r\n"
        head = head_of("PATCH", messages.UPLOAD.format(id=assignment), peer.credential, 10_000, more)
        await line.send_only(head + b"x" * (peer.number % 2))
        await asyncio.sleep(90.0)


async def packed(peer: Peer, line: Connection) -> None:
    """A body that becomes a thousand times as much."""
    more = "Content-Encoding: gzip\r\n"
    head = head_of("POST", messages.ASSIGNMENTS, peer.join_token, len(BOMB), more)
    while True:
        await line.send(head, BOMB)


async def refused(peer: Peer, line: Connection) -> None:
    """Wrong secrets without a pause."""
    while True:
        await line.send(json_request("POST", messages.ASSIGNMENTS, "wrong", {"rank": 8}))


async def asking(peer: Peer, line: Connection) -> None:
    """A member that asks without a pause."""
    while True:
        await peer.work(line, RANKS[0])


async def joining(peer: Peer, line: Connection) -> None:
    """New devices without a pause, with much to say of their machines."""
    record = {
        "name": "more",
        "fingerprint": FINGERPRINT,
        "profile": {"x": "x" * random.choice((3000, 50_000))},
    }
    while True:
        await line.send(json_request("POST", messages.JOIN, peer.join_token, record))


async def giving_up(peer: Peer, line: Connection) -> None:
    """Megabytes for an assignment that is given up for another."""
    while True:
        assignment = await peer.work(line, random.choice(RANKS))
        more = f"{messages.UPLOAD_OFFSET}: 0\r\n"
        place = messages.UPLOAD.format(id=assignment or "none")
        await line.send(head_of("PATCH", place, peer.credential, len(JUNK), more), JUNK)


JUNK = os.urandom(256 << 10)
WAYS: dict[str, Callable[[Peer, Connection], Awaitable[None]]] = {
    way.__name__: way
    for way in (unread, piled_up, silent, dripping, announced, packed, refused, asking, joining, giving_up)
}


async def attack(port: int, join_token: str, connections: int, seconds: float) -> Counter[str]:
    """All of them at a time; how often each way was tried."""
    peers = [Peer(number, port, join_token) for number in range(connections)]
    lives = [asyncio.create_task(peer.live()) for peer in peers]
    await asyncio.sleep(seconds)
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)
    return sum((peer.tried for peer in peers), Counter())


if __name__ == "__main__":
    port, token, connections, seconds = sys.argv[1:]
    if hasattr(os, "nice"):  # it would be another machine
        os.nice(10)
    print(json.dumps(asyncio.run(attack(int(port), token, int(connections), float(seconds)))))
