"""What a device makes of answers that no honest coordinator gives: one line, in bounded time and memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_sdk.connection import answers, transport
from edge_sdk.connection.refusals import error_of
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import EdgeError, OurFault, StaleUpdate, TheirFault, Unreachable, from_problem
from edge_sdk.core.messages import Ask

Speech = Callable[[socket.socket], None]
JSON = b"Content-Type: application/json\r\n"


class Liar:
    """Says the same to everybody who connects, and then hangs up."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            self._speech(connection)
            connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def told_by(speech: Speech | bytes) -> Iterator[Transport]:
    """A device's connection to a liar."""
    liar = Liar(speech if callable(speech) else lambda connection: connection.sendall(speech))
    connection = Transport(liar.url, "secret")
    try:
        yield connection
    finally:
        connection.close()
        liar.close()


def answer(body: bytes, head: bytes = JSON, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d x\r\n%sContent-Length: %d\r\n\r\n" % (status, head, len(body)) + body


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 x\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + b"[" * 65536 + b"\r\n")


def drip(first: bytes) -> Speech:
    def speak(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            time.sleep(0.05)
            connection.sendall(b"X")

    return speak


GIGABYTES = gzip.compress(b" " * (32 << 20))
LIES: dict[str, Speech | bytes] = {
    "endless": endless,
    "a length of petabytes": b"HTTP/1.1 200 x\r\n" + JSON + b"Content-Length: 1000000000000000\r\n\r\n{}",
    "packed": answer(GIGABYTES, JSON + b"Content-Encoding: gzip\r\n"),
    "deep": answer(b"[" * 500_000),
    "deep in an object": answer(b'{"id":' * 100_000),
    "a huge number": answer(b'{"retry_after_s": 1%s, "reason": ""}' % (b"0" * 400), status=503),
    "a number too long to be read": answer(b'{"retry_after_s": 1%s}' % (b"0" * 9000), status=503),
    "a negative wait": answer(b'{"retry_after_s": -1, "reason": ""}', status=503),
    "a list": answer(b"[]"),
    "nothing": answer(b""),
    "members of Python": answer(b'{"title": "not found", "self": 1, "message": 2, "detail": []}', status=404),
    "a charset that is none": answer(b"zz", b"Content-Type: text/plain; charset=hex\r\n", 400),
    "a title of our own": answer(b'{"title": "cannot write", "detail": "x"}', status=400),
    "an endless wait": answer(b'{"title": "busy", "retry_after_s": 1e999}', status=503),
    "a wait that is no number": answer(b'{"title": "busy", "retry_after_s": NaN}', status=503),
    "a date beyond all": answer(b"", b"Retry-After: Mon, 01 Jan 2024 00:00:00 +9999999999\r\n", 503),
    "a year beyond all": answer(b"", b"Retry-After: Mon, 01 Jan 99999999999999999999 00:00:00 GMT\r\n", 503),
    "a redirect to nowhere": answer(b"", b"Location: http://[::bad/\r\n", 302),
    "a redirect to a file": answer(b"", b"Location: file:///etc/passwd\r\n", 302),
    "no HTTP": b"SSH-2.0-x\r\n",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_every_lie_is_an_error_in_one_line(lie: Speech | bytes) -> None:
    began = time.monotonic()
    with told_by(lie) as connection, pytest.raises(EdgeError) as caught:
        connection.ask(Ask(4))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "first", [b"", b"HTTP/1.1 200 x\r\nA: ", b"HTTP/1.1 200 x\r\nContent-Length: 9999\r\n\r\n"]
)
def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(answers, "RECORD_S", 0.5)
    with told_by(drip(first)) as connection:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="did not come to an end within|no coordinator answers"):
            connection.ask(Ask(4))
        assert time.monotonic() - began < 10
        with pytest.raises(Unreachable):  # on a connection of its own
            connection.status()


def test_a_download_that_drips_is_given_up_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(answers, "WINDOW_S", 0.5)
    head = b'HTTP/1.1 200 x\r\nETag: "a"\r\nContent-Length: 9999\r\n\r\n'
    with told_by(drip(head)) as connection, pytest.raises(Unreachable, match="bytes a second; it goes on"):
        connection.download(1, 4, tmp_path / "file", most_bytes=10_000)
    assert (tmp_path / "file.part").stat().st_size > 0
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 1000000000000\r\n\r\n",
        b"\r\n",
        b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\n",
        b"Content-Length: 99999999999999999999999999\r\n\r\n",
    ],
)
def test_a_download_ends_at_the_size_that_is_expected(head: bytes, tmp_path: Path) -> None:
    def speak(connection: socket.socket) -> None:
        connection.sendall(b'HTTP/1.1 200 x\r\nETag: "a"\r\n' + head)
        while True:
            connection.sendall(b"x" * 65536)

    with told_by(speak) as connection, pytest.raises(Unreachable):
        connection.download(1, 4, tmp_path / "file", most_bytes=100_000)
    kept = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert kept <= 100_000


def test_a_part_is_continued_by_no_range_that_is_none(tmp_path: Path) -> None:
    for text in (b"bytes 0-1/" + b"9" * 5000, "bytes ٣-٤/٥".encode(), b"bytes 0-", b""):
        said = b"HTTP/1.1 206 x\r\nContent-Range: " + text + b"\r\nContent-Length: 2\r\n\r\nxx"
        with told_by(said) as connection, pytest.raises(Unreachable):
            connection.download(1, 4, tmp_path / "file", most_bytes=100_000)


@pytest.mark.parametrize("text", [b"9" * 5000, b"-1", b"x", "٣".encode()])
def test_an_offset_that_is_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "outbox").write_bytes(b"x")
    said = b"HTTP/1.1 200 x\r\nUpload-Offset: " + text + b"\r\n\r\n"
    with told_by(said) as connection, pytest.raises(Unreachable):
        connection.upload("a", tmp_path / "outbox")


def test_compressed_answers_are_not_asked_for(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def speak(connection: socket.socket) -> None:
        heard.append(b"")

    liar = Liar(speak)
    original = liar._answer

    def listening(connection: socket.socket) -> None:
        heard.append(connection.recv(65536, socket.MSG_PEEK))
        original(connection)

    liar._answer = listening  # type: ignore[method-assign]
    connection = Transport(liar.url, "secret")
    with pytest.raises(Unreachable):
        connection.status()
    connection.close()
    liar.close()
    assert b"accept-encoding: identity\r\n" in heard[0].lower()
    assert b"gzip" not in heard[0]


@pytest.mark.parametrize(
    "members",
    [
        {"self": 1, "message": "x", "args": [], "details": {}, "kind": None},
        {"detail": ["not", "text"]},
        {"detail": "x" * 1_000_000},
        {"status": "400"},
        {"status": True},
        {"retry_after_s": 10**400},
        {"retry_after_s": -(10**400)},
        {"retry_after_s": "soon"},
    ],
)
def test_a_problem_document_with_odd_members_is_an_error(members: dict[str, Any]) -> None:
    document = {"title": "update too stale", "status": 409, "detail": "x", "current_version": 3} | members
    error = from_problem(document)
    assert isinstance(error, StaleUpdate)
    assert len(str(error)) <= 4000
    said = httpx.Response(409, content=json.dumps(document), request=httpx.Request("GET", "http://x/"))
    known = error_of(said)
    assert isinstance(known, StaleUpdate)
    assert 0 <= known.details.get("retry_after_s", 0.0) <= 3600


@pytest.mark.parametrize(
    "title", ["cannot write", "worker died", "out of memory", "bad input", "unreachable"]
)
def test_a_coordinator_cannot_speak_of_what_only_the_device_knows(title: str) -> None:
    for status, kind in ((400, Unreachable), (500, OurFault)):
        document = json.dumps({"title": title, "status": status, "detail": "x"})
        said = httpx.Response(status, content=document, request=httpx.Request("GET", "http://x/"))
        assert type(error_of(said)) is kind


def test_an_unknown_title_is_judged_by_its_status() -> None:
    assert type(from_problem({"title": "x", "status": 404})) is TheirFault
    assert isinstance(from_problem({"title": [], "status": 500}), OurFault)
    assert transport.SLOW_BYTES_S > answers.LEAST_BYTES_S
