"""Uploads on their way through the event loop: few at a time, the rest unread, and beyond that told to wait.

However many devices send, memory stays what `PLACES` fast uploads need. Further uploads wait in a bounded
queue with their connections paused, so their bytes stay on the sender; when the queue is full, senders are
told to come back, each at another moment. A slow sender holds next to nothing in memory, and so gives its
place to another until it becomes fast: no number of slow links keeps a fast one waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from edge_sdk.core.errors import Busy

PLACES = 24  # fast uploads that are read at a time; each holds up to three times PIECE_BYTES
QUEUE = 128  # that may wait for a place; each holds what came with its head, at most 256 KB
OVERFLOW = 3  # times QUEUE that are let wait all the same: who was not told before its bytes were on the way
RETRY_S = 2.0  # who is refused comes back after this or up to twice as much
PIECE_BYTES = 1 << 20  # bytes that are written at once
PIECE_S = 1.0  # and the longest that any wait for that, so that a slow link loses little at a crash
SLOW_BYTES_S = 128 << 10  # a sender below this is slow …
SLOW_AFTER_S = 0.5  # … once it was for so long
SILENCE_S = 60.0  # an upload that sends nothing for this long is cut; it resumes at its offset
SILENCE = b"silence"  # told apart from a body's bytes by identity

Append = Callable[[int, Sequence[bytes]], Coroutine[Any, Any, int]]
"""Stores these pieces at an offset; where the stored bytes end then."""


class Body(Protocol):
    """Bytes that come in; empty at the end."""

    async def readany(self) -> bytes:
        """What is there, or what comes next."""
        ...


class Place:
    """The right of one upload to be read as fast as it comes."""

    def __init__(self, places: asyncio.Semaphore, connection: asyncio.Transport | None) -> None:
        self._places, self._connection = places, connection
        self._held = False

    async def take(self) -> None:
        """Hold a place, once there is one. The connection is not read until then."""
        if self._held:
            return
        connection = self._connection
        # Where nothing is read already, aiohttp holds the connection back and will let it go itself.
        if connection and self._places.locked() and connection.is_reading():
            connection.pause_reading()
            await self._places.acquire()
            connection.resume_reading()
        else:
            await self._places.acquire()
        self._held = True

    def leave(self) -> None:
        """Give it to another."""
        if self._held:
            self._held = False
            self._places.release()


class Intake:
    """All places. Belongs to one event loop."""

    def __init__(self, places: int = PLACES, queue: int = QUEUE) -> None:
        self._places, self._queue = asyncio.Semaphore(places), queue
        self._waiting = 0

    def require_room(self) -> None:
        """Raise Busy if an upload had better not begin now."""
        self._require_queue_below(self._queue)

    def _require_queue_below(self, most: int) -> None:
        if self._waiting >= most:
            retry_s = random.uniform(RETRY_S, 2 * RETRY_S)
            raise Busy("too many uploads at a time; try again later", retry_after_s=retry_s)

    @asynccontextmanager
    async def place(self, connection: asyncio.Transport | None) -> AsyncIterator[Place]:
        """Wait for a place and hold it, at most to the end of the block.

        Raises:
            Busy: the queue is full.
        """
        self._require_queue_below((1 + OVERFLOW) * self._queue)
        place = Place(self._places, connection)
        self._waiting += 1
        try:
            await place.take()
        finally:
            self._waiting -= 1
        try:
            yield place
        finally:
            place.leave()


class _Batch:
    """Pieces that are written together."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()

    def add(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.size_bytes += len(piece)

    @property
    def full(self) -> bool:
        return self.size_bytes >= PIECE_BYTES

    @property
    def old(self) -> bool:
        return self._clock() - self._since >= PIECE_S

    @property
    def slow(self) -> bool:
        age_s = self._clock() - self._since
        return age_s >= SLOW_AFTER_S and self.size_bytes < SLOW_BYTES_S * age_s


async def receive(body: Body, offset: int, append: Append, place: Place) -> int:
    """Hand a body to `append`, some pieces at once; the next ones are read meanwhile.

    Whatever ends it early, all that had come is handed over first.

    Returns:
        Where the stored bytes end.

    Raises:
        TimeoutError: nothing came for SILENCE_S.
    """
    batch = _Batch()
    writing: asyncio.Task[int] | None = None
    try:
        while piece := await _next_piece(body, PIECE_S if batch.pieces else SILENCE_S):
            if piece is not SILENCE:
                batch.add(piece)
            if batch.slow:
                place.leave()
            if piece is SILENCE or batch.full or batch.old:
                if writing:
                    offset = await writing
                writing = asyncio.create_task(append(offset, batch.pieces))
                if batch.full:
                    await place.take()
                batch = _Batch()
    finally:
        if writing:
            offset = await writing
        if batch.pieces:
            offset = await append(offset, batch.pieces)
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
