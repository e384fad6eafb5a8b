"""Answers whose receiver takes nothing: found by what the system says was acknowledged, whoever sent it.

The event loop's own buffer does not tell: a file that the system sends by itself never passes through it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Any

LEAST_BYTES_S = 256  # the same that a device wants of a download
_ACKNOWLEDGED = struct.Struct("120xQ")  # tcpi_bytes_acked of Linux's struct tcp_info; its layout only grows


def taken_bytes(connection: Any) -> int | None:
    """Bytes that the other end has acknowledged so far; None where the system does not say."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or not hasattr(connection, "getsockopt"):
        return None
    with contextlib.suppress(OSError):
        said = connection.getsockopt(socket.IPPROTO_TCP, option, _ACKNOWLEDGED.size)
        if len(said) == _ACKNOWLEDGED.size:
            return int(_ACKNOWLEDGED.unpack(said)[0])
    return None


@dataclass
class Patience:
    """How long an answer has not been taken. `most_s`: no longer than this, or a little more."""

    most_s: float
    since: float | None = None
    taken: int | None = None
    buffered_bytes: int = 0

    def is_over(self, now: float, buffered_bytes: int, taken: int | None) -> bool:
        """Look once more at a connection that owes something.

        Args:
            now: seconds that never go backwards.
            buffered_bytes: what waits in the event loop.
            taken: as `taken_bytes` says.
        """
        if self.since is None:
            self._begin(now, buffered_bytes, taken)
        elif now - self.since >= self.most_s:
            if not self._moved(now - self.since, buffered_bytes, taken):
                return True
            self._begin(now, buffered_bytes, taken)
        return False

    def _moved(self, seconds: float, buffered_bytes: int, taken: int | None) -> bool:
        if taken is None or self.taken is None:
            return buffered_bytes != self.buffered_bytes or not buffered_bytes
        return taken - self.taken >= LEAST_BYTES_S * seconds

    def _begin(self, now: float, buffered_bytes: int, taken: int | None) -> None:
        self.since, self.buffered_bytes, self.taken = now, buffered_bytes, taken

    def end(self) -> None:
        """The connection owes nothing."""
        self.since = None
