"""Connections that cost more than they bring: unread, silent, packed, or more than there are files."""

from __future__ import annotations

import contextlib
import gzip
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.messages import UPLOAD_OFFSET
from edge_sdk.core.records import to_json
from tests.coordinator.devices import SCALING, random_adapter, update_of
from tests.hostile.harness import GoodDevice, Target, attacked, bearer
from tests.processes import PATIENCE_S

CONTENT = encode(random_adapter(4, 5, 0.01), SCALING)
SOON_S = 30.0


@contextlib.contextmanager
def connections(target: Target, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(target)) for _ in range(count)]


def connect(target: Target) -> socket.socket:
    """One that takes little before its owner reads it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(PATIENCE_S)
    made.connect(("127.0.0.1", target.coordinator.port))
    return made


def request(method: str, path: str, secret: str = "", *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *more]
    lines += [f"Authorization: Bearer {secret}"] if secret else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def announced(device: GoodDevice, assignment: str, size_bytes: int) -> bytes:
    """The head of an upload of so many bytes."""
    path = f"/v1/assignments/{assignment}/adapter"
    said = (f"{UPLOAD_OFFSET}: 0", f"Content-Length: {size_bytes}")
    return request("PATCH", path, device.credential, *said)


def until(holds: Callable[[], bool], what: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up; what it sent before is read."""
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 20):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def pile_up(connection: socket.socket, asked: bytes) -> None:
    """Ask and read nothing until no more can be sent."""
    connection.setblocking(False)
    for _ in range(200):
        try:
            connection.send(asked)
        except BlockingIOError:
            return


# --- answers that nobody reads --------------------------------------------------------------------


def held_by(target: Target) -> int:
    """Connections that the coordinator holds."""
    return sum(one.status == psutil.CONN_ESTABLISHED for one in target.process.net_connections("tcp"))


def test_answers_that_are_never_read(tmp_path: Path) -> None:
    """Of records and of files, which the system sends by itself; cut after the time that the host says."""
    with (
        attacked(tmp_path, limits={"answer_s": 1.0, "requests_s": 1e4, "refusals_s": 1e4}) as target,
        contextlib.closing(target.device()) as device,
        connections(target, 60) as opened,
    ):
        file = "/v1/versions/0/ranks/8/adapter_model.safetensors"
        kinds = [
            request("GET", "/v1/openapi.json"),
            request("GET", "/v1/federation", target.coordinator.join_token),
            request("GET", file, device.credential),
        ]
        for number, connection in enumerate(opened):
            pile_up(connection, kinds[number % len(kinds)] * 200)
        assert target.serve(3) < SOON_S
        until(lambda: held_by(target) < 5, "they are still held")


def test_an_answer_that_is_read_slowly_is_not_cut(tmp_path: Path) -> None:
    with (
        attacked(tmp_path, limits={"answer_s": 1.0, "requests_s": 1e4, "refusals_s": 1e4}) as target,
        contextlib.closing(target.device()) as device,
        connections(target, 1) as (connection,),
    ):
        file = "/v1/versions/0/ranks/8/adapter_model.safetensors"
        pile_up(connection, request("GET", file, device.credential) * 200)
        connection.settimeout(PATIENCE_S)
        ends = time.monotonic() + 4.0
        while time.monotonic() < ends:
            assert connection.recv(64 << 10)
            time.sleep(0.05)


def test_requests_that_are_piled_up_behind_each_other(tmp_path: Path) -> None:
    """A connection has so many requests read as wait behind one; the rest stays with who sends them."""
    with attacked(tmp_path) as target, connections(target, 20) as opened:
        before = target.process.memory_info().rss
        for connection in opened:
            pile_up(connection, request("GET", "/v1/openapi.json", "", "X: " + "x" * 4000) * 100)
        assert target.serve(3) < SOON_S
        assert target.process.memory_info().rss < before + (64 << 20)


# --- more connections than there are files --------------------------------------------------------


def test_no_file_is_left_for_another_connection(tmp_path: Path) -> None:
    """The log says so once; those that wait come in when others close, and some are closed for them."""
    with attacked(tmp_path) as target:
        limits = target.process.rlimit(resource.RLIMIT_NOFILE)
        few = target.process.num_fds() + 6
        target.process.rlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        said = target.coordinator.log.stat().st_size
        with connections(target, 300):
            time.sleep(3.0)
        assert target.coordinator.log.stat().st_size - said < 2000
        assert "no connection can be accepted" in target.coordinator.log.read_text()
        answer = httpx.get(f"{target.coordinator.url}/v1/openapi.json", timeout=SOON_S, trust_env=False)
        assert answer.status_code == 200
        target.process.rlimit(resource.RLIMIT_NOFILE, limits)


def test_more_connections_than_the_host_allows(tmp_path: Path) -> None:
    """The quietest goes for the newest, so a good device always comes in."""
    with (
        attacked(tmp_path, limits={"connections": 50, "connections_of_address": 50}) as target,
        connections(target, 400) as opened,
    ):
        assert target.serve(3) < SOON_S
        assert held_by(target) <= 50
        until(lambda: sum(map(is_closed, opened)) >= 350, "none was closed for another")


def test_more_connections_than_an_address_may_have(tmp_path: Path) -> None:
    limits: dict[str, object] = {"connections": 1000, "connections_of_address": 20}
    with attacked(tmp_path, limits=limits) as target, connections(target, 100) as opened:
        assert target.serve(3) < SOON_S
        assert held_by(target) <= 20
        assert all(is_closed(connection) for connection in opened[:70])


def test_a_connection_that_is_at_work_is_not_closed_for_others(tmp_path: Path) -> None:
    limits: dict[str, object] = {"connections": 30, "connections_of_address": 30}
    with attacked(tmp_path, limits=limits) as target, contextlib.closing(target.device()) as device:
        work = device.work()
        with connections(target, 1) as (sending,):
            sending.sendall(announced(device, work, len(CONTENT)) + CONTENT[:100])
            until(lambda: offset_of(device, work) == 100, "the bytes are not stored")
            with connections(target, 200):
                assert target.serve(3) < SOON_S
                sending.sendall(CONTENT[100:])
                assert b" 204 " in sending.recv(4096)


# --- uploads that are announced and do not come ---------------------------------------------------


def test_uploads_that_are_announced_and_never_sent(tmp_path: Path) -> None:
    """By twenty members, two each; and by others whose bytes stop after they had come quickly."""
    with attacked(tmp_path) as target, contextlib.ExitStack() as stack:
        hostile = [stack.enter_context(contextlib.closing(target.device(f"h{n}"))) for n in range(20)]
        for number, device in enumerate(hostile):
            for rank in (2, 4):
                answer = device.ask(rank)
                if answer.status_code != 200:
                    continue
                (connection,) = stack.enter_context(connections(target, 1))
                connection.sendall(announced(device, answer.json()["id"], 1000) + b"x" * 500 * (number % 2))
        assert target.serve(3) < SOON_S


def test_the_newest_connection_goes_on_with_an_upload(tmp_path: Path) -> None:
    """Of an older one its device most likely knows no more; what that had brought counts."""
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        work = device.work()
        with connections(target, 1) as (older,):
            older.sendall(announced(device, work, len(CONTENT)) + CONTENT[:1000])
            until(lambda: offset_of(device, work) == 1000, "the bytes are not stored")
            begun = time.monotonic()
            assert device.patch(work, CONTENT[1000:], 1000).status_code == 204
            assert time.monotonic() - begun < SOON_S
            assert is_closed(older)
        record = to_json(update_of(CONTENT, 4))
        delivered = device.http.post(f"/v1/assignments/{work}/update", json=record)
        assert delivered.status_code == 202, delivered.text
        target.acknowledged.append(work)


def offset_of(device: GoodDevice, assignment: str) -> int:
    return int(device.http.head(f"/v1/assignments/{assignment}/adapter").headers[UPLOAD_OFFSET])


def test_a_device_sends_few_uploads_at_a_time(tmp_path: Path) -> None:
    policy: dict[str, object] = {"first_lease_s": 1.0}
    with (
        attacked(tmp_path, policy, limits={"uploads_of_device": 1}) as target,
        contextlib.closing(target.device()) as device,
    ):
        first = device.work(2)
        second = device.work(4)
        with connections(target, 2) as (older, newer):
            older.sendall(announced(device, first, 1000) + b"x" * 10)
            until(lambda: offset_of(device, first) == 10, "the bytes are not stored")
            newer.sendall(announced(device, second, 1000) + b"x" * 10)
            until(lambda: is_closed(older), "both are under way")
            assert not is_closed(newer)


# --- bodies that are packed -----------------------------------------------------------------------


def test_packed_bodies_are_refused_and_not_unpacked(tmp_path: Path) -> None:
    packed = gzip.compress(b"\x00" * (200 << 20), 9)
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        begun, spent = time.monotonic(), sum(target.process.cpu_times()[:2])
        for path, secret in (("/v1/join", target.coordinator.join_token), ("/v1/assignments", "wrong")):
            for encoding in ("gzip", "deflate", "br", "GZIP", "zstd"):
                headers = {"Content-Encoding": encoding} | bearer(secret)
                answer = device.http.post(path, content=packed, headers=headers)
                assert answer.status_code == 415, answer.text
                assert "Content-Encoding" in answer.json()["detail"]
        assert time.monotonic() - begun < SOON_S
        assert sum(target.process.cpu_times()[:2]) - spent < 5.0  # unpacking takes some 3 s for each MB


def test_what_is_not_packed_may_say_so(tmp_path: Path) -> None:
    with attacked(tmp_path) as target, contextlib.closing(target.device()) as device:
        headers = {"Content-Encoding": "identity"}
        answer = device.http.post("/v1/assignments", json={"rank": 4}, headers=headers)
        assert answer.status_code == 200


# --- together -------------------------------------------------------------------------------------


def test_members_and_strangers_that_ask_without_a_pause(tmp_path: Path) -> None:
    """Each is answered late once it has asked too often, so the others have the coordinator."""
    with attacked(tmp_path, limits={"requests_s": 5.0, "refusals_s": 5.0}) as target:
        over, counted = threading.Event(), [0]
        with contextlib.closing(target.device("hostile")) as hostile:

            def ask(secret: str) -> None:
                with httpx.Client(base_url=target.coordinator.url, timeout=60.0, trust_env=False) as http:
                    while not over.is_set():
                        http.post("/v1/assignments", json={"rank": 4}, headers=bearer(secret))
                        counted[0] += 1

            threads = [threading.Thread(target=ask, args=(s,)) for s in (hostile.credential, "wrong") * 4]
            for thread in threads:
                thread.start()
            time.sleep(2.0)
            counted[0] = 0
            assert target.serve(3) < SOON_S
            time.sleep(3.0)
            assert counted[0] < 3 * 5.0 * 2 + 60
            over.set()
            for thread in threads:
                thread.join()
