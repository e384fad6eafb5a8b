"""Accepting connections, also when there are more than the system has files for.

`asyncio.Server` accepts as many at a time as may wait, and when the process has no file left it says so as
often, every second, with a traceback each: 2 MB a second of log for 2048 that wait. Here one accept that
fails is said once a minute, a quiet connection is closed for it, and those that wait are taken when there is
room again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable
from typing import Any

from coordinator.service.fault_log import FaultLog
from coordinator.web.connections import Connection, Connections, Seat
from edge_sdk.core.errors import InternalError

BACKLOG = 2048  # connections that may wait to be accepted, when many devices wake together
AT_ONCE = 32  # accepted before others in the event loop have their turn
HANDSHAKE_S = 10.0  # that TLS may take
AGAIN_S = 0.2  # after an accept that failed for want of files or memory
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

MakeConnection = Callable[[Seat], Connection]


class Listener:
    """Takes connections and gives each a seat.

    Args:
        make: HTTP for a connection that has a seat.
        connections: where seats come from.
        faults: hears when the system has no room.
        tls: what to speak on them; None for plain HTTP.
    """

    def __init__(
        self,
        make: MakeConnection,
        connections: Connections,
        faults: FaultLog,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._make, self._connections, self._faults, self._tls = make, connections, faults, tls
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> list[Any]:
        """Listen; the addresses, with the port that a 0 became.

        Raises:
            OSError, OverflowError: that cannot be.
        """
        loop = asyncio.get_running_loop()
        bound = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
        self._sockets = [one.dup() for one in bound.sockets]
        bound.close()
        for listening in self._sockets:
            listening.setblocking(False)
            listening.listen(BACKLOG)
            self._begin(self._accept(listening))
        self._begin(self._connections.watch())
        return [listening.getsockname() for listening in self._sockets]

    async def close(self) -> None:
        """Accept no more; the connections that there are stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop, taken = asyncio.get_running_loop(), 0
        while True:
            try:
                accepted, address = await loop.sock_accept(listening)
            except OSError as error:  # a peer may also have gone already
                if error.errno in NO_ROOM:
                    self._no_room(error)
                await asyncio.sleep(AGAIN_S if error.errno in NO_ROOM else 0.0)
                continue
            if seat := self._connections.admit(accepted, str(address[0])):
                self._begin(self._serve(accepted, seat))
            else:
                accepted.close()
            taken += 1
            if taken % AT_ONCE == 0:  # one that waits already is accepted without a pause
                await asyncio.sleep(0)

    def _no_room(self, error: OSError) -> None:
        reason = f"no connection can be accepted ({error.strerror}); the host may raise `ulimit -Hn`"
        self._faults.log("accept", InternalError(reason))
        self._connections.make_room()

    async def _serve(self, accepted: socket.socket, seat: Seat) -> None:
        loop = asyncio.get_running_loop()
        handshake_s = HANDSHAKE_S if self._tls else None
        try:
            await loop.connect_accepted_socket(
                lambda: self._make(seat), accepted, ssl=self._tls, ssl_handshake_timeout=handshake_s
            )
        except (OSError, TimeoutError):  # among them what a peer gets wrong in TLS
            self._connections.release(seat)
            with contextlib.suppress(OSError):
                accepted.close()
