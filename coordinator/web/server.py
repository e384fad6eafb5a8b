"""The HTTP server of a coordinator: when it closes connections, and what becomes of what is not HTTP."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from coordinator.service.refusals import Refusals
from edge_sdk.system.terminal import Log, logger

IDLE_S = 15.0  # longer than between heartbeats, shorter than waits; also the longest that a head may take
CLOSING_S = 5.0  # that requests under way have when the server stops
NOT_HTTP = "not HTTP"


def make_runner(app: web.Application, refusals: Refusals, idle_s: float = IDLE_S) -> web.AppRunner:
    """A server for `app`, not started yet. A connection that brings no whole head for `idle_s` is closed."""
    return web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=CLOSING_S,
        keepalive_timeout=idle_s,
        logger=ServerLog(refusals),
    )


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
