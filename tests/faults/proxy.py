"""A TCP proxy that breaks HTTP on purpose, by rules, between a device and its coordinator. Real sockets.

    with Proxy(coordinator.port) as proxy:
        rule = proxy.on("PATCH", "/adapter", CutRequest(after_bytes=1000))
        … a device that is told proxy.url …
        assert rule.triggered == 1

Every rule counts how often it was triggered, so that no test passes without its fault. What no rule is about
goes through untouched. One request at a time on a connection, as HTTP/1.1 clients send them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType

CHUNK_BYTES = 4096
PAIR = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Head:
    """First line and headers of a request or an answer, and how its body is framed."""

    first: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def without(self, *names: str) -> Head:
        return Head(self.first, [(key, value) for key, value in self.headers if key.lower() not in names])

    def encoded(self) -> bytes:
        lines = [self.first, *(f"{key}: {value}" for key, value in self.headers)]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass
class Exchange:
    """One request on its way, with the connection of the device."""

    head: Head
    device: PAIR
    port: int

    @property
    def method(self) -> str:
        return self.head.first.split(" ")[0]

    @contextlib.asynccontextmanager
    async def coordinator(self) -> AsyncIterator[PAIR]:
        """A connection of its own to the coordinator, closed at the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def request_body(self) -> AsyncIterator[bytes]:
        """What the device sends after the head."""
        async for chunk in body(self.device[0], self.head, "request"):
            yield chunk

    async def ask(self, coordinator: PAIR, chunks: AsyncIterator[bytes]) -> Head:
        """Send the request with this body; the head of the answer."""
        await send(coordinator[1], self.head, chunks)
        return await read_head(coordinator[0])

    async def answer(self, head: Head, chunks: AsyncIterator[bytes]) -> None:
        """Give the device an answer."""
        await send(self.device[1], head, chunks)

    def answer_body(self, coordinator: PAIR, head: Head) -> AsyncIterator[bytes]:
        return body(coordinator[0], head, self.method)

    def close(self) -> None:
        """End the device's connection in good order (FIN)."""
        self.device[1].close()

    def reset(self) -> None:
        """End it by RST, as a broken link does."""
        raw = self.device[1].get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.device[1].transport.abort()


# --- framing ----------------------------------------------------------------------------------------


async def read_head(reader: asyncio.StreamReader) -> Head:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = [line.split(":", 1) for line in lines[1:] if line]
    return Head(lines[0], [(key, value.strip()) for key, value in pairs])


async def body(reader: asyncio.StreamReader, head: Head, of: str) -> AsyncIterator[bytes]:
    """The body behind a head: chunked, of a length, until the end of the connection, or none."""
    length = head.get("content-length")
    if of == "HEAD" or head.first.split(" ")[1] in ("204", "304"):
        return
    if head.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
    elif length:
        left = int(length)
        while left:
            chunk = await reader.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ConnectionError("the other side hung up")
            left -= len(chunk)
            yield chunk
    elif of != "request":
        while chunk := await reader.read(CHUNK_BYTES):
            yield chunk


async def send(writer: asyncio.StreamWriter, head: Head, chunks: AsyncIterator[bytes]) -> None:
    """A head and its body, framed as the head says."""
    chunked = head.get("transfer-encoding") == "chunked"
    writer.write(head.encoded())
    async for chunk in chunks:
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk)
        await writer.drain()
    if chunked:
        writer.write(b"0\r\n\r\n")
    await writer.drain()


async def first_bytes(chunks: AsyncIterator[bytes], count: int) -> AsyncIterator[bytes]:
    """No more than `count` bytes of a body."""
    left = count
    async for chunk in chunks:
        yield chunk[:left]
        left -= len(chunk[:left])
        if not left:
            return


async def whole(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def one(content: bytes) -> AsyncIterator[bytes]:
    if content:
        yield content


# --- faults -----------------------------------------------------------------------------------------


class Fault:
    """What happens to a request. This one: nothing, it goes through. True if the connection lives on."""

    async def play(self, exchange: Exchange) -> bool:
        async with exchange.coordinator() as coordinator:
            head = await exchange.ask(coordinator, self.requested(exchange.request_body()))
            await exchange.answer(head, self.answered(exchange.answer_body(coordinator, head)))
        return bool(head.get("content-length")) or exchange.method == "HEAD" or " 204 " in head.first

    def requested(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return chunks

    def answered(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return chunks


@dataclass
class CutRequest(Fault):
    """The connection ends after so many bytes of the request's body; both sides see it."""

    after_bytes: int
    reset: bool = False  # by RST rather than FIN

    async def play(self, exchange: Exchange) -> bool:
        async with exchange.coordinator() as coordinator:
            chunks = first_bytes(exchange.request_body(), self.after_bytes)
            await send(coordinator[1], exchange.head, chunks)
        (exchange.reset if self.reset else exchange.close)()
        return False


@dataclass
class CutAnswer(Fault):
    """The connection ends after so many bytes of the answer's body."""

    after_bytes: int
    reset: bool = False
    hide_length: bool = False  # the answer claims no length, so that its end looks like the end of the body

    async def play(self, exchange: Exchange) -> bool:
        async with exchange.coordinator() as coordinator:
            head = await exchange.ask(coordinator, exchange.request_body())
            if self.hide_length:
                head = head.without("content-length", "connection")
                head.headers.append(("Connection", "close"))
            chunks = exchange.answer_body(coordinator, head)
            await exchange.answer(head, first_bytes(chunks, self.after_bytes))
        (exchange.reset if self.reset else exchange.close)()
        return False


@dataclass
class Throttle(Fault):
    """Bodies pass at so many bytes a second, both ways."""

    bytes_s: float = 10_000

    async def _slowly(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            await asyncio.sleep(len(chunk) / self.bytes_s)
            yield chunk

    def requested(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return self._slowly(chunks)

    def answered(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return self._slowly(chunks)


@dataclass
class Delay(Fault):
    """Nothing happens for a while."""

    seconds: float

    async def play(self, exchange: Exchange) -> bool:
        await asyncio.sleep(self.seconds)
        return await super().play(exchange)


@dataclass
class Answer(Fault):
    """The coordinator never hears of it; the proxy answers itself."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b"<html>a proxy says no</html>"

    async def play(self, exchange: Exchange) -> bool:
        await whole(exchange.request_body())
        content = b"" if exchange.method == "HEAD" or self.status == 204 else self.content
        length = [("Content-Length", str(len(content)))] if self.status != 204 else []
        head = Head(f"HTTP/1.1 {self.status} Said", [*self.headers.items(), *length])
        await exchange.answer(head, one(content))
        return True


@dataclass
class Swallow(Fault):
    """The coordinator hears it and answers; the device gets nothing but the end of the connection."""

    async def play(self, exchange: Exchange) -> bool:
        async with exchange.coordinator() as coordinator:
            head = await exchange.ask(coordinator, exchange.request_body())
            await whole(exchange.answer_body(coordinator, head))
        exchange.close()
        return False


@dataclass
class Duplicate(Fault):
    """The coordinator gets the request twice, the device one of the answers."""

    second: bool = True

    async def play(self, exchange: Exchange) -> bool:
        sent, answers = await whole(exchange.request_body()), []
        for _ in range(2):
            async with exchange.coordinator() as coordinator:
                head = await exchange.ask(coordinator, one(sent))
                answers.append((head, await whole(exchange.answer_body(coordinator, head))))
        head, content = answers[self.second]
        await exchange.answer(head, one(content))
        return True


@dataclass
class Garbage(Fault):
    """Bytes that are no HTTP at all."""

    content: bytes = b"\x00\xff\x16\x03\x01 no answer\r\n" * 8

    async def play(self, exchange: Exchange) -> bool:
        await whole(exchange.request_body())
        exchange.device[1].write(self.content)
        with contextlib.suppress(ConnectionError):
            await exchange.device[1].drain()
        exchange.close()
        return False


@dataclass
class Spoil(Fault):
    """One byte of a body arrives as another; `answer`: of the answer rather than the request."""

    at_byte: int
    answer: bool = False

    async def _spoilt(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        place = self.at_byte
        async for chunk in chunks:
            if 0 <= place < len(chunk):
                chunk = chunk[:place] + bytes([chunk[place] ^ 0xFF]) + chunk[place + 1 :]
            place -= len(chunk)
            yield chunk

    def requested(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return chunks if self.answer else self._spoilt(chunks)

    def answered(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        return self._spoilt(chunks) if self.answer else chunks


@dataclass
class BlackHole(Fault):
    """The connection stays open and nobody reads or answers."""

    async def play(self, exchange: Exchange) -> bool:
        await asyncio.Event().wait()  # until the proxy ends
        return False


# --- rules and the proxy ----------------------------------------------------------------------------


@dataclass
class Rule:
    """A fault for some requests of a method whose path contains a pattern: from the nth on, so many."""

    method: str
    path: str
    fault: Fault
    nth: int = 1
    times: int = 1
    seen: int = 0
    triggered: int = 0

    def matches(self, exchange: Exchange) -> bool:
        method, path, _ = exchange.head.first.split(" ")
        if not (re.fullmatch(self.method, method) and re.search(self.path, path)):
            return False
        self.seen += 1
        if not self.nth <= self.seen < self.nth + self.times:
            return False
        self.triggered += 1
        return True


class Proxy:
    """Listens on a port of its own, in a thread of its own, in front of a port of this machine.

    Attributes:
        requests: the heads of all that came, in order.
    """

    def __init__(self, port: int) -> None:
        self.upstream, self.port = port, 0
        self.requests: list[Head] = []
        self._rules: list[Rule] = []
        self._connections: set[asyncio.Task[None] | None] = set()  # the loop itself refers to them weakly
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def on(self, method: str, path: str, fault: Fault, nth: int = 1, times: int = 1) -> Rule:
        """Add a rule; of several that match, the first counts."""
        rule = Rule(method, path, fault, nth, times)
        self._rules.append(rule)
        return rule

    def asked(self, method: str, path: str) -> list[Head]:
        """The requests of a method whose path contains a pattern."""
        pattern = re.compile(rf"{method} \S*{path.removesuffix('$')}{' ' if path.endswith('$') else ''}")
        return [head for head in self.requests if pattern.match(head.first)]

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._ending = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._ending.wait()
        server.close()
        tasks = [task for task in self._connections if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection until it ends."""
        self._connections.add(asyncio.current_task())
        broken = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*broken):
            while True:
                exchange = Exchange(await read_head(reader), (reader, writer), self.upstream)
                self.requests.append(exchange.head)
                fault = next((rule.fault for rule in self._rules if rule.matches(exchange)), Fault())
                if not await fault.play(exchange):
                    break
        writer.close()
        with contextlib.suppress(*broken):
            await writer.wait_closed()
