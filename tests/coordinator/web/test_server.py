"""The HTTP server closes connections that bring nothing, and its library's own faults stay tracebacks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from coordinator.service.coordinator import Coordinator
from coordinator.service.fault_log import FaultLog
from coordinator.service.refusals import Refusals
from coordinator.settings import load_settings
from coordinator.web import app
from coordinator.web.connections import Connections
from coordinator.web.server import IDLE_S, ServerLog, WebServer
from tests.coordinator.devices import configuration

SHORT_S = 0.3
PATIENCE_S = 30.0


@contextlib.asynccontextmanager
async def serving(application: web.Application, idle_s: float) -> AsyncIterator[int]:
    server = WebServer(application, Refusals(), FaultLog(), Connections(100, 100), idle_s=idle_s)
    try:
        ((_, port),) = await server.start("127.0.0.1", 0)
        yield port
    finally:
        await server.stop()


async def ending_of(port: int, sent: bytes, every_s: float) -> float:
    """Seconds until the server closes a connection that brings a byte of `sent` at a time."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            for byte in sent:
                writer.write(bytes([byte]))
                await asyncio.sleep(every_s)

    dripping = asyncio.create_task(drip())
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
    dripping.cancel()
    writer.close()
    return clock() - begun


@pytest.mark.parametrize(
    "sent", [b"", b"GET /v1/status HTTP/1.1\r\nX: " + b"x" * 100_000], ids=["silent", "slow"]
)
def test_a_connection_without_a_whole_head_is_closed(sent: bytes) -> None:
    async def run() -> float:
        async with serving(web.Application(), SHORT_S) as port:
            return await ending_of(port, sent, 0.01)

    assert SHORT_S <= asyncio.run(run()) < PATIENCE_S / 2
    assert IDLE_S <= 60.0


def test_a_record_that_stops_coming_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", SHORT_S)
    file = tmp_path / "coordinator.toml"
    file.write_text(configuration(tmp_path))

    async def run() -> bytes:
        coordinator = Coordinator(tmp_path / "data", load_settings(file))
        head = (
            f"POST /v1/join HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {coordinator.join_token}\r\n"
        )
        async with serving(app.build_app(coordinator), IDLE_S) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + b'Content-Length: 1000\r\n\r\n{"half": ')
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read(1000)
            writer.close()
        assert coordinator.refusals.count == 1
        return answer

    assert b" 408 " in asyncio.run(run())


def test_a_fault_of_the_library_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    log: Any = ServerLog(refusals)
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        log.exception("Unhandled exception", exc_info=error)
    assert refusals.count == 0
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
