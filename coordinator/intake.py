"""Uploads on their way through the event loop: few at a time, the rest unread, and beyond that told to wait.

However many devices send, memory stays what `PLACES` uploads need. Who comes then waits in a bounded queue
with its connection paused, so that its bytes stay in its own machine; who comes when the queue is full is
told to come back, each at another moment.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from edge_sdk.core.errors import Busy

PLACES = 16  # uploads whose bytes are read at a time
QUEUE = 256  # that may wait for a place; each holds what came with its head, at most 256 KB
OVERFLOW = 3  # times QUEUE that are let wait all the same: who was not told before its bytes were on the way
RETRY_S = 2.0  # who is refused comes back after this or up to twice as much
PIECE_BYTES = 1 << 20  # bytes that are written at once
PIECE_S = 1.0  # and the longest that any wait for that, so that a slow link loses little at a crash
SILENCE_S = 60.0  # an upload that sends nothing for this long is cut; it resumes at its offset

SILENCE = b"silence"  # told apart from a body's bytes by identity

Append = Callable[[int, Sequence[bytes]], Coroutine[Any, Any, int]]
"""Stores these pieces at an offset; where the stored bytes end then."""


class Body(Protocol):
    """Bytes that come in; empty at the end."""

    async def readany(self) -> bytes:
        """What is there, or what comes next."""
        ...


class Intake:
    """The places of uploads. Belongs to one event loop."""

    def __init__(self, places: int = PLACES, queue: int = QUEUE) -> None:
        self._places, self._enough = asyncio.Semaphore(places), places + queue
        self._most = self._enough + OVERFLOW * queue
        self._inside = 0

    def require_room(self) -> None:
        """Raise Busy if an upload had better not begin now."""
        self._require_fewer_than(self._enough)

    def _require_fewer_than(self, most: int) -> None:
        if self._inside >= most:
            retry_s = random.uniform(RETRY_S, 2 * RETRY_S)
            raise Busy(
                "more uploads come than can be taken in at a time; try again later", retry_after_s=retry_s
            )

    @asynccontextmanager
    async def place(self, connection: asyncio.Transport | None) -> AsyncIterator[None]:
        """Hold a place, once there is one. `connection` is not read until then.

        Raises:
            Busy: the queue is full.
        """
        self._require_fewer_than(self._most)
        self._inside += 1
        try:
            # Where nothing is read already, aiohttp holds the connection back and will let it go itself.
            if connection and self._places.locked() and connection.is_reading():
                connection.pause_reading()
                await self._places.acquire()
                connection.resume_reading()
            else:
                await self._places.acquire()
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._inside -= 1


async def receive(body: Body, offset: int, append: Append) -> int:
    """Hand a body to `append`, some pieces at once; the next ones are read meanwhile.

    Whatever ends it early, all that had come is handed over first.

    Returns:
        Where the stored bytes end.

    Raises:
        TimeoutError: nothing came for SILENCE_S.
    """
    loop = asyncio.get_running_loop()
    pieces: list[bytes] = []
    size_bytes, since = 0, loop.time()
    writing: asyncio.Task[int] | None = None
    try:
        while piece := await _next_piece(body, PIECE_S if pieces else SILENCE_S):
            if piece is not SILENCE:
                pieces.append(piece)
                size_bytes += len(piece)
            if piece is SILENCE or size_bytes >= PIECE_BYTES or loop.time() - since >= PIECE_S:
                if writing:
                    offset = await writing
                writing = asyncio.create_task(append(offset, pieces))
                pieces, size_bytes, since = [], 0, loop.time()
    finally:
        if writing:
            offset = await writing
        if pieces:
            offset = await append(offset, pieces)
    return offset


async def _next_piece(body: Body, patience_s: float) -> bytes:
    """What comes next, empty at the end; SILENCE if nothing does for PIECE_S, where that is the patience."""
    try:
        async with asyncio.timeout(patience_s):
            return await body.readany()
    except TimeoutError:
        if patience_s < SILENCE_S:
            return SILENCE
        raise
