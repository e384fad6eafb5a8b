"""The connections of a server: how many there may be, which are closed for others, which are cut.

One that is in the middle of a request stays. Any other may be closed at any time, as HTTP has it: its owner
connects again when it has something to ask. So where there are too many, the one goes that has been quiet for
longest, and whoever holds thousands that say nothing keeps nobody out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from coordinator.limits.networks import network_of
from coordinator.web.unread import Patience, taken_bytes
from edge_sdk.core.addresses import is_local

LOOKS = 6  # at what an answer's receiver takes, within the time that it has


class Seat:
    """One accepted connection, from before its first byte to its end."""

    def __init__(self, network: str, accepted: socket.socket, answer_s: float) -> None:
        self.network, self.socket = network, accepted
        self.transport: asyncio.Transport | None = None  # once it is there, after a TLS handshake perhaps
        self.requests = self.files = 0  # under way, and being sent
        self.unread = Patience(answer_s)

    def cut(self) -> None:
        """End it at once, whatever it has not sent or taken.

        `loop.sendfile` would never hear that its transport is gone, but it hears of the socket.
        """
        if self.transport is not None and not self.files:
            self.transport.abort()
        else:
            with contextlib.suppress(OSError):  # its peer was quicker
                self.socket.shutdown(socket.SHUT_RDWR)


@dataclass
class _Network:
    """Connections from one address."""

    count: int = 0
    quiet: OrderedDict[Seat, None] = field(default_factory=OrderedDict)


class Connections:
    """All of a server. Belongs to one event loop.

    Args:
        most: at a time.
        of_address: the most of one address, None where addresses are counted together with all others only.
            Without `strict` the addresses of this machine are not counted: a proxy may stand there.
        strict: the host named the number.
        answer_s: an answer of which nothing is taken for so long is cut.
        is_proxy: says of an address that it is a proxy of the host's, whose connections are many people's.
    """

    def __init__(
        self,
        most: int,
        of_address: int | None = None,
        strict: bool = False,
        answer_s: float = 30.0,
        is_proxy: Callable[[str], bool] = lambda address: False,
    ) -> None:
        self._most, self._of_address, self._strict, self._answer_s = most, of_address, strict, answer_s
        self._is_proxy = is_proxy
        self._networks: dict[str, _Network] = {}
        self._quiet: OrderedDict[Seat, None] = OrderedDict()  # the longest first
        self._all: set[Seat] = set()

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, accepted: socket.socket, address: str) -> Seat | None:
        """A seat for a connection that was just accepted; None if all others are at work."""
        network = network_of(address)
        known = self._networks.get(network)
        counted = not self._is_proxy(address) and (self._strict or not is_local(address))
        most = self._of_address if counted else None
        if known and most and known.count >= most and not self._close_quietest(known.quiet):
            return None
        if len(self._all) >= self._most and not self.make_room():
            return None
        seat = Seat(network, accepted, self._answer_s)
        self._all.add(seat)
        self._networks.setdefault(network, _Network()).count += 1
        self._rest(seat)
        return seat

    def make_room(self) -> bool:
        """Close the connection that has been quiet for longest; False if there is none."""
        return self._close_quietest(self._quiet)

    def _close_quietest(self, quiet: OrderedDict[Seat, None]) -> bool:
        if not quiet:
            return False
        seat = next(iter(quiet))
        self.release(seat)
        seat.cut()
        return True

    def release(self, seat: Seat) -> None:
        """It has ended, or is about to."""
        if seat not in self._all:
            return
        self._all.remove(seat)
        self._work(seat)
        network = self._networks[seat.network]
        network.count -= 1
        if not network.count:
            del self._networks[seat.network]

    def _rest(self, seat: Seat) -> None:
        """From now on it is the one that was quiet for the shortest time."""
        for quiet in (self._quiet, self._networks[seat.network].quiet):
            quiet[seat] = None
            quiet.move_to_end(seat)

    def _work(self, seat: Seat) -> None:
        self._quiet.pop(seat, None)
        self._networks[seat.network].quiet.pop(seat, None)

    @contextlib.contextmanager
    def at_work(self, seat: Seat, sends_file: bool = False) -> Iterator[None]:
        """While inside, it is not closed for others. `sends_file`: of which the event loop sees nothing."""
        seat.requests += 1
        seat.files += sends_file
        if seat in self._all:
            self._work(seat)
        try:
            yield
        finally:
            seat.requests -= 1
            seat.files -= sends_file
            if seat in self._all and not seat.requests:
                self._rest(seat)

    async def watch(self) -> None:
        """Cut those that take nothing of their answers, until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._answer_s / LOOKS)
            for seat in [seat for seat in self._all if self._is_unread(seat, clock())]:
                self.release(seat)
                seat.cut()

    @staticmethod
    def _is_unread(seat: Seat, now: float) -> bool:
        waiting = seat.transport.get_write_buffer_size() if seat.transport else 0
        if not waiting and not seat.files:
            seat.unread.end()
            return False
        return seat.unread.is_over(now, waiting, taken_bytes(seat.socket))


class Connection(web.RequestHandler):
    """HTTP on one connection that has a seat. `settings`: of the library's handler."""

    def __init__(self, seat: Seat, connections: Connections, server: web.Server, **settings: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **settings)
        self.seat, self.connections = seat, connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As `asyncio.Protocol.connection_made`."""
        assert isinstance(transport, asyncio.Transport)
        self.seat.transport = transport
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """As `asyncio.Protocol.connection_lost`."""
        self.connections.release(self.seat)
        super().connection_lost(exc)


def at_work(request: web.BaseRequest, sends_file: bool = False) -> contextlib.AbstractContextManager[None]:
    """`Connections.at_work` for the connection of a request, where that has a seat."""
    protocol = request.protocol
    if isinstance(protocol, Connection):
        return protocol.connections.at_work(protocol.seat, sends_file)
    return contextlib.nullcontext()
