"""Many HTTP connections from one thread, cheaply: requests are bytes built before, bodies are not copied.

`httpx` and aiohttp's client take longer for a request than the coordinator for its answer. This takes a fifth
of that, and sends a body of many megabytes from one block of memory.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
RETRY_AFTER = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
OFFSET = re.compile(rb"\r\nupload-offset: *(\d+)", re.IGNORECASE)
READ_BYTES = 256 << 10
TIMEOUT_S = 120.0  # an answer that takes longer is a failure


class BrokenOff(Exception):
    """The other side closed the connection before its answer was whole."""


@dataclass
class Reply:
    """Status, head and body of an answer. A body that was only to be counted is empty."""

    status: int
    head: bytes
    body: bytes
    body_bytes: int

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def retry_after_s(self) -> float | None:
        """What the other side asks to wait, if it does."""
        found = RETRY_AFTER.search(self.head)
        return float(found[1]) if found else None

    @property
    def offset(self) -> int | None:
        """Upload-Offset."""
        found = OFFSET.search(self.head)
        return int(found[1]) if found else None


def head_of(method: str, route: str, token: str, length: int = 0, more: str = "") -> bytes:
    """The bytes before a body of `length`; `more` are header lines, each with its line end."""
    return (
        f"{method} {route} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{more}"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def json_request(method: str, route: str, token: str, value: Mapping[str, Any]) -> bytes:
    """A whole request with a JSON body."""
    body = json.dumps(value).encode()
    return head_of(method, route, token, len(body), "Content-Type: application/json\r\n") + body


@dataclass
class Connection:
    """One keep-alive connection; opened at the first request, and again after the other side closed it."""

    port: int
    _socket: socket.socket | None = None
    _rest: bytes = b""

    async def send(self, *parts: bytes | memoryview, keep_body: bool = True) -> Reply:
        """One request and its answer.

        A server may close an idle connection just when a request is on its way. Those of one part are then
        sent again on a new one, as HTTP clients do (RFC 9110, section 9.2.2): all may be repeated, but for a
        join, which would leave a device that never comes.

        Raises:
            BrokenOff, ConnectionError, TimeoutError: no whole answer came; the connection is closed.
        """
        was_open = self._socket is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._exchange(parts, keep_body)
        except (BrokenOff, OSError, TimeoutError) as error:
            self.close()
            if was_open and len(parts) == 1 and isinstance(error, BrokenOff | ConnectionError):
                return await self.send(*parts, keep_body=keep_body)
            raise

    async def send_only(self, content: bytes) -> None:
        """Send bytes and expect no answer."""
        await self.open()
        assert self._socket is not None
        await asyncio.get_running_loop().sock_sendall(self._socket, content)

    async def open(self) -> None:
        """Connect, if not connected, or hung up on while nothing was sent."""
        if self._socket is not None and _is_hung_up(self._socket):
            self.close()
        if self._socket is None:
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self.port))
            except BaseException:
                made.close()
                raise
            self._socket = made

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    async def _exchange(self, parts: tuple[bytes | memoryview, ...], keep_body: bool) -> Reply:
        await self.open()
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        for part in parts:
            await loop.sock_sendall(self._socket, part)
        got = self._rest
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += await self._read()
        head, body = got[: end + 2], [got[end + 4 :]]
        status = int(head[9:12])
        found = LENGTH.search(head)
        bodyless = parts[0][:5] == b"HEAD " or status in (204, 304)
        length = int(found[1]) if found and not bodyless else 0
        have = len(body[0])
        while have < length:
            piece = await self._read()
            have += len(piece)
            if keep_body:
                body.append(piece)
        self._rest = b""
        if b"\r\nConnection: close" in head:
            self.close()
        return Reply(status, head, b"".join(body) if keep_body else b"", length)

    async def _read(self) -> bytes:
        assert self._socket is not None
        piece = await asyncio.get_running_loop().sock_recv(self._socket, READ_BYTES)
        if not piece:
            raise BrokenOff("closed before the answer was whole")
        return piece


def _is_hung_up(line: socket.socket) -> bool:
    """Whether the other side has closed an idle connection, as servers do."""
    try:
        return line.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@dataclass
class Tally:
    """How long each route took, what it answered, and what went wrong."""

    times_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    waits: int = 0  # told to come back later
    errors: list[str] = field(default_factory=list)

    async def timed(
        self, route: str, connection: Connection, *parts: bytes | memoryview, keep_body: bool = True
    ) -> Reply:
        """Send, and note the time; an answer that is neither good nor "later" is an error."""
        began = time.perf_counter()
        try:
            reply = await connection.send(*parts, keep_body=keep_body)
        except (BrokenOff, OSError, TimeoutError) as error:
            self.errors.append(f"{route}: {type(error).__name__} {error}")
            raise
        self.times_s[route].append(time.perf_counter() - began)
        if reply.status == 503 and reply.retry_after_s is not None:
            self.waits += 1
        elif reply.status >= 400:
            self.errors.append(f"{route}: {reply.status} {reply.body[:200]!r}")
        return reply

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Route -> count, p50, p99 and longest in milliseconds."""
        return {route: _quantiles(times) for route, times in sorted(self.times_s.items())}


def _quantiles(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)

    def at(share: float) -> float:
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"count": len(ordered), "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": 1e3 * ordered[-1]}


async def each(items: list[Any], workers: int, work: Callable[[int, Any], Any]) -> float:
    """Do `work(worker, item)` for all items, so many at a time; the seconds it took."""
    waiting = iter(items)

    async def take(worker: int) -> None:
        for item in waiting:
            await work(worker, item)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for worker in range(workers):
            group.create_task(take(worker))
    return time.perf_counter() - began
