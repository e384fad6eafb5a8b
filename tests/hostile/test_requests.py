"""Requests of strangers and members that are malformed, endless, or too many, against a real coordinator."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.records import to_json
from edge_sdk.core.routes import ROUTES
from tests.coordinator.devices import FINGERPRINT, SCALING, random_adapter, update_of
from tests.hostile.harness import Target, attacked, bearer, raw

CONTENT = encode(random_adapter(4, 5, 0.01), SCALING)


@contextlib.contextmanager
def connections(target: Target, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", target.coordinator.port)
        yield [stack.enter_context(socket.create_connection(address, 30.0)) for _ in range(count)]


JOIN = b"POST /v1/join HTTP/1.1\r\nHost: localhost\r\n"
NOT_HTTP = [
    b"\x00" * 4096,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,  # TLS
    b"GET\r\n\r\n",
    b"GET /v1/status HTTP/9.9\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nHost: y\r\nno colon\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    JOIN + b"Content-Length: -1\r\n\r\n",
    JOIN + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    JOIN + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    JOIN + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    JOIN + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nA:\x00\r\n\r\n",
]


def refusals_in(target: Target) -> list[str]:
    return [line for line in target.coordinator.log.read_text().splitlines() if "  refused (" in line]


def counted(target: Target) -> int:
    answer = httpx.get(
        f"{target.coordinator.url}/v1/status", headers=bearer(target.coordinator.host_token), timeout=60.0
    )
    return int(answer.json()["bad_requests"])


def test_requests_that_are_not_http(tmp_path: Path) -> None:
    """A line for the first, and one at the end for the others: no traceback, and all are counted."""
    with attacked(tmp_path) as target:
        for sent in NOT_HTTP:
            answered = raw(target.coordinator, sent)
            statuses = [int(line[9:12]) for line in answered.split(b"\r\n") if line.startswith(b"HTTP/1.")]
            assert all(400 <= status < 500 for status in statuses), (sent[:80], statuses)
            assert len(statuses) <= 1, sent[:80]
        assert counted(target) == len(NOT_HTTP)
        log = target.coordinator.log
    said = refusals_in(target)
    assert len(said) == 2, log.read_text()
    assert "refused (not HTTP) from 127.0.0.1: " in said[0]
    assert f"… and {len(NOT_HTTP) - 1} more in the last minute, the last from 127.0.0.1" in said[1]


def test_bodies_that_are_not_http(tmp_path: Path) -> None:
    """The head is refused before its body turns out to be none."""
    head = JOIN + b"Transfer-Encoding: chunked\r\n\r\n"
    with attacked(tmp_path) as target, connections(target, 10) as opened:
        for connection in opened:
            connection.sendall(head)
            assert b" 401 " in connection.recv(4096)
            connection.sendall(b"zz\r\n")


REFUSED = (
    ("GET", "/v1/status", {}, 401),
    ("GET", "/v1/status", {"Authorization": "Bearer wrong"}, 401),
    ("GET", "/wrong/path%0a00:00:00%20%20version%209:%209%20updates", {}, 404),
    ("DELETE", "/v1/status", {}, 405),
)


def test_a_flood_of_refused_requests(tmp_path: Path) -> None:
    """Two lines of each kind, however many there are."""
    with attacked(tmp_path) as target:
        with httpx.Client(base_url=target.coordinator.url, timeout=60.0, trust_env=False) as http:
            for method, path, headers, status in REFUSED:
                for _ in range(100):
                    assert http.request(method, path, headers=headers).status_code == status, path
        assert counted(target) == 100 * len(REFUSED)
        size = target.coordinator.log.stat().st_size
    assert size < 10_000
    said = refusals_in(target)
    assert 3 <= len(said) <= 2 * len(REFUSED)
    assert sum("… and " in line for line in said) == 3


RECORDS = [
    b"[" * 60_000,
    b'{"a":' * 10_000,
    b'{"rank": 1e999}',
    b'{"rank": ' + b"9" * 4000 + b"}",
    b'{"rank": -1}',
    b'{"rank": 4, "rank": 99999999999999999999}',
    b'\xff\xfe{"rank": 4}',
    b'{"rank": "\\ud800"}',
    b"\x1f\x8b\x08\x00" + b"\x00" * 100,
    b"x" * (65 << 10),
    b"null",
]


def test_records_that_are_none(tmp_path: Path) -> None:
    """On every route that takes a record, with and without a content type that means something."""
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        work = device.work()
        for route in ROUTES:
            if not isinstance(route.body, type):
                continue
            secret = target.coordinator.join_token if route.caller == "join token" else device.credential
            for body in RECORDS:
                for kind in ("application/json", "text/xml; charset=utf-7"):
                    headers = {"Content-Type": kind} | bearer(secret)
                    answer = device.http.post(route.path.format(id=work), content=body, headers=headers)
                    assert 400 <= answer.status_code < 500, (route.name, body[:40], answer.text)
                    assert "\n" not in answer.json()["detail"]


def test_bodies_that_stop_halfway(tmp_path: Path) -> None:
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        work = device.work()
        for path in (f"/v1/assignments/{work}/update", f"/v1/assignments/{work}/adapter", "/v1/join"):
            method = "PATCH" if path.endswith("adapter") else "POST"
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Authorization: Bearer {device.credential}\r\n"
            head += "Upload-Offset: 0\r\nContent-Type: application/offset+octet-stream\r\n"
            for _ in range(20):
                raw(target.coordinator, head.encode() + b'Content-Length: 1000\r\n\r\n{"half": ')


def drip(connection: socket.socket, request: bytes, ending: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for byte in request:
            if ending.wait(0.05):
                return
            connection.sendall(bytes([byte]))


def test_requests_that_drip(tmp_path: Path) -> None:
    """A byte every 50 ms, on every route; others are served meanwhile."""
    with attacked(tmp_path) as target, connections(target, 4 * len(ROUTES)) as opened:
        ending = threading.Event()
        threads = []
        for number, connection in enumerate(opened):
            route = ROUTES[number % len(ROUTES)]
            path = route.path.format(id="x", version=0, rank=2, dtype="int8")
            request = (
                f"{route.method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
                + "x" * 99
            )
            threads.append(threading.Thread(target=drip, args=(connection, request.encode(), ending)))
            threads[-1].start()
        assert target.serve(3) < 30.0
        time.sleep(1.0)
        ending.set()
        for thread in threads:
            thread.join()


def test_connections_that_say_nothing(tmp_path: Path) -> None:
    with attacked(tmp_path) as target, connections(target, 400):
        assert target.serve(3) < 30.0


def test_joins_in_a_flood(tmp_path: Path) -> None:
    with attacked(tmp_path) as target:
        body = {"name": "flood", "fingerprint": FINGERPRINT}
        refused: list[int] = []

        def flood() -> None:
            with httpx.Client(base_url=target.coordinator.url, timeout=60.0, trust_env=False) as http:
                for _ in range(100):
                    answer = http.post("/v1/join", json=body, headers=bearer(target.coordinator.join_token))
                    if answer.status_code not in (201, 429, 503):
                        refused.append(answer.status_code)

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert target.serve(3) < 30.0
        for thread in threads:
            thread.join()
        assert refused == []


OFFSETS = (-1, 1, len(CONTENT), 10**30, "9" * 5000, "1e3", "0x0", "", "1_0")
IDS = ("..", "%2e%2e%2f%2e%2e%2fcoordinator.sqlite", "%00", "a%0d%0ab", "%2fetc%2fpasswd", "x" * 5000, "'--")


def test_uploads_that_play_with_offsets_and_ids(tmp_path: Path) -> None:
    with (
        attacked(tmp_path) as target,
        contextlib.closing(target.device("one")) as one,
        contextlib.closing(target.device("two")) as two,
    ):
        work = one.work()
        for offset in OFFSETS:
            assert one.patch(work, CONTENT, offset).status_code in (400, 409), offset
        assert one.patch(work, bytes(1 << 20)).status_code == 413
        assert two.patch(work, CONTENT).status_code == 404
        assert (
            two.http.post(f"/v1/assignments/{work}/update", json=to_json(update_of(CONTENT, 4))).status_code
            == 404
        )
        for id in IDS:
            assert 400 <= one.patch(id, CONTENT).status_code < 500, id
        files = {path.name for path in tmp_path.rglob("*")}
        assert not files & {"passwd", "x" * 5000}


def lying_headers() -> Iterator[bytes]:
    """Files whose header and data do not go together; the first header is the honest one."""
    length = struct.unpack("<Q", CONTENT[:8])[0]
    honest, data = json.loads(CONTENT[8 : 8 + length]), CONTENT[8 + length :]
    first = next(name for name in honest if name != "__metadata__")
    for change in (
        {"data_offsets": [0, 10**18]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [8, 0]},
        {"shape": [10**9, 10**9]},
        {"shape": [-1, -1]},
        {"shape": [10**400]},
        {"dtype": "F64"},
        {"dtype": "F" * 10_000},
    ):
        yield packed(honest | {first: honest[first] | change}) + data
    for header in (b"", b"[" * 5000, b"null", b"{}", b'{"a":NaN}', b"\xff\xfe"):
        yield struct.pack("<Q", len(header)) + header + data
    for claimed in (0, 7, 10**8, 2**63, 2**64 - 1):
        yield struct.pack("<Q", claimed) + CONTENT[8:]


def packed(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_adapter_files_whose_headers_lie(tmp_path: Path) -> None:
    with attacked(tmp_path) as target:
        for number, content in enumerate(lying_headers()):
            with contextlib.closing(target.device(f"liar {number}")) as device:
                work = device.work()
                uploaded = device.patch(work, content)
                assert uploaded.status_code in (204, 413), uploaded.text
                record = to_json(update_of(content, 4))
                answer = device.http.post(f"/v1/assignments/{work}/update", json=record)
                assert answer.status_code in (400, 409, 413, 422), (number, answer.text)
                assert "\n" not in answer.json()["detail"]
