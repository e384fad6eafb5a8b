"""Somebody else at a coordinator's address, who takes whatever comes and answers every request alike."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.core.errors import Unauthorised

DOCUMENT = json.dumps(
    {"title": Unauthorised.title, "status": 401, "detail": "join again with the join token"}
)
ANSWER = (
    "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"
    f"Content-Length: {len(DOCUMENT)}\r\n\r\n{DOCUMENT}"
).encode()


class Impostor:
    """What it heard: `requests` holds what was sent as a request, `raw` what came before or without TLS."""

    def __init__(self, port: int, tls: ssl.SSLContext | None, host: str = "127.0.0.1") -> None:
        self.requests = b""
        self.raw = b""
        self.connections = 0
        self._tls = tls
        self._listening = socket.create_server((host, port), reuse_port=False)
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                with contextlib.suppress(OSError), connection:
                    connection.settimeout(5.0)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        if self._tls is None:
            self.raw += connection.recv(65536)
            connection.sendall(ANSWER)
            return
        with self._tls.wrap_socket(connection, server_side=True) as secured:
            self.requests += secured.recv(65536)
            secured.sendall(ANSWER)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(10.0)


@contextlib.contextmanager
def impostor(port: int, tls: ssl.SSLContext | None, host: str = "127.0.0.1") -> Iterator[Impostor]:
    """One at that port, until the end of the block."""
    made = Impostor(port, tls, host)
    try:
        yield made
    finally:
        made.close()


def speaking_tls(cert: Path, key: Path) -> ssl.SSLContext:
    """As a server with this certificate does, of whatever version of TLS the other side likes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context
