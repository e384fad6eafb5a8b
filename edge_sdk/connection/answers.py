"""Answers of a coordinator that nobody vouches for: read to an end of ours, in bytes and in seconds.

A time-out of a socket counts from the last byte, so an answer that drips never meets it. `Patience` counts
from the beginning, or from when it was told that something worth waiting for has come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import httpx

from edge_sdk.core.errors import Unreachable

MOST_RECORD_BYTES = 1 << 20  # thousands of modules of a base take some hundred kilobytes
RECORD_S = 120.0  # for a whole answer, its head included
WINDOW_S, LEAST_BYTES_S = 60.0, 256  # a download that brings less than this in such a time is given up
HEAD_BYTES = 4096  # of an answer that is only looked at for an error
PLAIN = {"Accept-Encoding": "identity"}  # no answer grows while it is unpacked


class Patience:
    """Calls `give_up` in a thread of its own once `seconds` are over, if still inside, and is `lost` then."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._seconds, self._give_up = seconds, give_up
        self._until = time.monotonic() + seconds
        self._over = threading.Event()
        self.lost = False

    def __enter__(self) -> Patience:
        threading.Thread(target=self._watch, name="edge-sdk-patience", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def again(self) -> None:
        """Something came that was worth waiting for: all the seconds begin anew."""
        self._until = time.monotonic() + self._seconds

    def _watch(self) -> None:
        while not self._over.wait(max(0.0, self._until - time.monotonic())):
            if time.monotonic() >= self._until:
                self.lost = True
                self._give_up()
                return


def whole(response: httpx.Response, most_bytes: int) -> httpx.Response:
    """The same answer with its body read, of at most `most_bytes`.

    Raises:
        Unreachable: it is longer, or compressed although nobody asked for that.
    """
    require_plain(response)
    pieces, size_bytes = [], 0
    for piece in response.iter_raw():
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes > most_bytes:
            raise Unreachable(
                f"{response.request.url} answers with more than {most_bytes} bytes; is it a coordinator?"
            )
    head = [(name, value) for name, value in response.headers.raw if name.lower() != b"transfer-encoding"]
    return httpx.Response(
        response.status_code, headers=head, content=b"".join(pieces), request=response.request
    )


def require_plain(response: httpx.Response) -> None:
    """Raise Unreachable for a body that would have to be unpacked: its bytes may become gigabytes."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise Unreachable(
            f"{response.request.url} answers in {encoding[:40]!r}, which was not asked for; "
            "is there a proxy that compresses?"
        )


def in_time(pieces: Iterator[int], clock: Callable[[], float] = time.monotonic) -> Iterator[int]:
    """The sizes of pieces that come, as long as they bring LEAST_BYTES_S over every WINDOW_S.

    Raises:
        Unreachable: they come slower.
    """
    began, came = clock(), 0
    for size_bytes in pieces:
        yield size_bytes
        came += size_bytes
        if (passed_s := clock() - began) >= WINDOW_S:
            if came < LEAST_BYTES_S * passed_s:
                raise Unreachable(
                    f"the download brings {came / passed_s:.0f} bytes a second; it goes on later"
                )
            began, came = clock(), 0
