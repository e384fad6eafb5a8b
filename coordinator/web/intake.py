"""Uploads on their way through the event loop: few at a time, the rest unread, and beyond that told to wait.

However many devices send, memory stays what `PLACES` fast uploads need. Further uploads wait in a bounded
queue with their connections paused, so their bytes stay on the sender; when the queue is full, senders are
told to come back, each at another moment. A place is for bytes that come: an upload takes one when it has
brought some, and a slow or silent sender, which holds next to nothing in memory, gives it to another. So no
number of slow links, or of uploads that are announced and never sent, keeps a fast one waiting.

One connection sends an upload, and few those of one device. The newest goes first: of an older one the device
most likely knows no more.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from edge_sdk.core.errors import Busy

PLACES = 24  # fast uploads that are read at a time; each holds up to three times PIECE_BYTES
QUEUE = 128  # that may wait for a place; each holds what came with its head, at most 256 KB
OVERFLOW = 3  # times QUEUE that are let wait all the same: who was not told before its bytes were on the way
RETRY_S = 2.0  # who is refused comes back after this or up to twice as much
PROOF_BYTES = 64 << 10  # an upload that has brought so much at once wants a place
PIECE_BYTES = 1 << 20  # bytes that are written at once
PIECE_S = 1.0  # and the longest that any wait for that, so that a slow link loses little at a crash
SLOW_BYTES_S = 128 << 10  # a sender below this is slow …
SLOW_AFTER_S = 0.5  # … once it was for so long
SILENCE_S = 60.0  # an upload that sends nothing for this long is cut; it resumes at its offset
TURN_S = 10.0  # that an older connection has, once it is cut, to store what had come
SILENCE = b""  # in place of bytes; they are never empty

Append = Callable[[int, Sequence[bytes]], Coroutine[Any, Any, int]]
"""Stores these pieces at an offset; where the stored bytes end then."""


class Body(Protocol):
    """Bytes that come in; empty at the end."""

    async def readany(self) -> bytes:
        """What is there, or what comes next."""
        ...


class Place:
    """The right of one upload to be read as fast as it comes."""

    def __init__(self, intake: Intake, connection: asyncio.Transport | None) -> None:
        self._intake, self._connection = intake, connection
        self._held = False

    async def take(self) -> None:
        """Hold a place, once there is one. The connection is not read until then."""
        if self._held:
            return
        connection, intake = self._connection, self._intake
        with intake.waiting():
            # Where nothing is read already, aiohttp holds the connection back and will let it go itself.
            if connection and intake.places.locked() and connection.is_reading():
                connection.pause_reading()
                await intake.places.acquire()
                connection.resume_reading()
            else:
                await intake.places.acquire()
        self._held = True

    def leave(self) -> None:
        """Give it to another."""
        if self._held:
            self._held = False
            self._intake.places.release()


class _Turn:
    """One connection that sends an upload."""

    def __init__(self, connection: asyncio.Transport | None) -> None:
        self._connection = connection
        self.over = asyncio.Event()

    async def end(self) -> None:
        """Cut it, and wait until what had come is stored."""
        if self._connection:
            self._connection.abort()
        try:
            async with asyncio.timeout(TURN_S):
                await self.over.wait()
        except TimeoutError:
            raise Busy("an older connection still sends this upload", retry_after_s=RETRY_S) from None


class Intake:
    """All places, and whose turn it is. Belongs to one event loop."""

    def __init__(self, places: int = PLACES, queue: int = QUEUE) -> None:
        self.places, self._queue = asyncio.Semaphore(places), queue
        self._waiting = 0
        self._turns: dict[str, dict[str, _Turn]] = {}  # device -> upload, the oldest first

    def require_room(self) -> None:
        """Raise Busy if an upload had better not begin now."""
        self._require_queue_below(self._queue)

    def _require_queue_below(self, most: int) -> None:
        if self._waiting >= most:
            retry_s = random.uniform(RETRY_S, 2 * RETRY_S)
            raise Busy("too many uploads at a time; try again later", retry_after_s=retry_s)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While inside, an upload waits for a place.

        Raises:
            Busy: the queue is full.
        """
        self._require_queue_below((1 + OVERFLOW) * self._queue)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @contextmanager
    def place(self, connection: asyncio.Transport | None) -> Iterator[Place]:
        """A place that may be taken, and is held at most to the end of the block."""
        place = Place(self, connection)
        try:
            yield place
        finally:
            place.leave()

    @asynccontextmanager
    async def turn(
        self, device: str, upload: str, connection: asyncio.Transport | None, of_device: int
    ) -> AsyncIterator[None]:
        """Be the connection that sends this upload, and one of a few of its device: older ones are cut.

        Raises:
            Busy: what an older one had brought is not stored yet.
        """
        mine, turns = _Turn(connection), self._turns.setdefault(device, {})
        older = [turns.pop(upload)] if upload in turns else []
        while len(turns) >= of_device:
            older.append(turns.pop(next(iter(turns))))
        turns[upload] = mine
        try:
            for turn in older:
                await turn.end()
            yield
        finally:
            mine.over.set()
            if turns.get(upload) is mine:
                del turns[upload]
            if not turns:
                self._turns.pop(device, None)


class _Batch:
    """Pieces that are written together."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size_bytes = 0
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()

    def add(self, piece: bytes) -> None:
        if piece:
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
        Busy: it is fast, and too many others are.
    """
    batch, proof_bytes = _Batch(), PROOF_BYTES
    writing: asyncio.Task[int] | None = None
    try:
        async for piece in _pieces(body):
            batch.add(piece)
            if batch.slow:
                place.leave()
                proof_bytes = PIECE_BYTES  # what a slow link brings at once is little, however it is bundled
            elif batch.size_bytes >= proof_bytes:
                await place.take()
            if batch.full or (batch.old and batch.pieces):
                if writing:
                    offset = await writing
                writing = asyncio.create_task(append(offset, batch.pieces))
            if batch.full or batch.old:
                batch = _Batch()
    finally:
        if writing:
            offset = await writing
        if batch.pieces:
            offset = await append(offset, batch.pieces)
    return offset


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    """What comes, to its end; SILENCE whenever nothing does for PIECE_S.

    Raises:
        TimeoutError: nothing came for SILENCE_S.
    """
    clock = asyncio.get_running_loop().time
    heard_at = clock()
    while True:
        try:
            async with asyncio.timeout(min(PIECE_S, SILENCE_S)):
                piece = await body.readany()
        except TimeoutError:
            if clock() - heard_at >= SILENCE_S:
                raise
            yield SILENCE
            continue
        if not piece:
            return
        heard_at = clock()
        yield piece
