"""The HTTP server of a coordinator: when it closes connections, and what becomes of what is not HTTP."""

from __future__ import annotations

import ssl
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from coordinator.service.fault_log import FaultLog
from coordinator.service.refusals import Refusals
from coordinator.web.connections import Connection, Connections, Seat
from coordinator.web.listener import Listener
from edge_sdk.system.terminal import Log, logger

IDLE_S = 15.0  # longer than between heartbeats, shorter than waits; also the longest that a head may take
CLOSING_S = 5.0  # that requests under way have when the server stops
NOT_HTTP = "not HTTP"


class WebServer:
    """Serves `app` on connections that are counted. One that brings no whole head for `idle_s` is closed."""

    def __init__(
        self,
        app: web.Application,
        refusals: Refusals,
        faults: FaultLog,
        connections: Connections,
        tls: ssl.SSLContext | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self._connections = connections
        self._settings: dict[str, Any] = {
            "access_log": None,
            "keepalive_timeout": idle_s,
            "logger": ServerLog(refusals),
            "auto_decompress": False,  # what is packed is refused, and not unpacked to be thrown away
        }
        self._runner = web.AppRunner(app, shutdown_timeout=CLOSING_S, **self._settings)
        self._listener = Listener(self._connection, connections, faults, tls)

    async def start(self, host: str, port: int) -> list[Any]:
        """Begin to serve; the addresses, with the port that a 0 became.

        Raises:
            OSError, OverflowError: one cannot listen there.
        """
        await self._runner.setup()
        return await self._listener.open(host, port)

    async def stop(self) -> None:
        """Take no more, and let requests under way end."""
        await self._listener.close()
        await self._runner.cleanup()

    def _connection(self, seat: Seat) -> Connection:
        assert self._runner.server is not None
        return Connection(seat, self._connections, self._runner.server, **self._settings)


class ServerLog(Log):
    """The logger of the HTTP library: what a stranger sent is counted, and only a bug has a traceback."""

    def __init__(self, refusals: Refusals) -> None:
        super().__init__(logger("coordinator").logger)
        self._refusals = refusals

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """As `logging.Logger.log`. The library gives the sender's address along with an error of parsing."""
        error = kwargs.get("exc_info")
        if isinstance(error, HttpProcessingError | web.RequestPayloadError):
            sender = str(args[0]) if args else "somebody who was refused already"
            self._refusals.add(NOT_HTTP, sender, " ".join(str(error).split()))
        else:
            super().log(level, msg, *args, **kwargs)
