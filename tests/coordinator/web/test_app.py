"""A real coordinator process over real sockets: what it grants, what it refuses, and how."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from edge_sdk.connection.transport import Transport
from edge_sdk.core import messages
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import (
    AdapterError,
    BaseMismatch,
    NotFound,
    OffsetConflict,
    ProtocolError,
    TooLarge,
    Unauthorised,
)
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Ask, Heartbeat, JoinRequest
from tests.coordinator.devices import (
    FINGERPRINT,
    LADDER,
    SCALING,
    SHAPES,
    Device,
    configuration,
    member,
    random_adapter,
    update_of,
)
from tests.processes import MOST_BYTES, CoordinatorProcess


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    """One for the whole file; it merges nothing by itself, because a quorum never comes together."""
    folder = tmp_path_factory.mktemp("coordinator")
    with CoordinatorProcess(folder, configuration(folder, {"buffer_size": 1000, "quorum": 1000})) as process:
        yield process
        assert process.stop() == 0
        log = process.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture
def device(coordinator: CoordinatorProcess) -> Iterator[Device]:
    with member(coordinator) as made:
        yield made


@pytest.fixture
def merging(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    """One that makes a version of every update."""
    with CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1})) as process:
        yield process


def request(
    coordinator: CoordinatorProcess, method: str, route: str, token: str | None = None, **arguments: Any
) -> httpx.Response:
    """Any request that a stranger might send."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.request(
        method,
        coordinator.url + route,
        headers=headers | arguments.pop("headers", {}),
        timeout=30.0,
        **arguments,
    )


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The members of a problem document, as RFC 9457 has them."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"].startswith("application/problem+json")
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document


def wait_for_version(device: Device, version: int) -> None:
    deadline = time.monotonic() + 30.0
    while device.status().version < version:
        assert time.monotonic() < deadline, device.status()
        time.sleep(0.02)


# --- joining --------------------------------------------------------------------------------------


def test_a_device_joins_and_learns_the_federation(coordinator: CoordinatorProcess, device: Device) -> None:
    federation = device.transport.federation()
    assert federation.base.modules == SHAPES
    assert federation.ladder == tuple(LADDER)
    assert device.id in {known.id for known in device.status().devices}


def test_the_join_token_shows_the_federation_and_no_more(coordinator: CoordinatorProcess) -> None:
    guest = Transport(coordinator.url, coordinator.join_token)
    assert guest.federation().base.fingerprint == FINGERPRINT
    with pytest.raises(Unauthorised):
        guest.ask(Ask(4))
    guest.close()


@pytest.mark.parametrize("token", ["wrong", "x" * 1000])
def test_a_wrong_token_is_refused(coordinator: CoordinatorProcess, token: str) -> None:
    stranger = Transport(coordinator.url, token)
    for attempt in (
        lambda: stranger.join(JoinRequest("attic", FINGERPRINT)),
        stranger.federation,
        stranger.status,
        lambda: stranger.ask(Ask(4)),
    ):
        with pytest.raises(Unauthorised) as refusal:
            attempt()
        assert refusal.value.status == 401
    stranger.close()


def test_a_token_that_is_no_text_is_refused(coordinator: CoordinatorProcess) -> None:
    problem(request(coordinator, "GET", messages.STATUS, headers={"Authorization": b"Bearer \xff\xfe"}), 401)


def test_another_base_model_is_refused_with_both_fingerprints(coordinator: CoordinatorProcess) -> None:
    guest = Transport(coordinator.url, coordinator.join_token)
    with pytest.raises(BaseMismatch, match=f"{'cd' * 6}.*{FINGERPRINT[:12]}") as refusal:
        guest.join(JoinRequest("attic", "cd" * 32))
    assert refusal.value.status == 409
    guest.close()


def test_credentials_are_stored_hashed(coordinator: CoordinatorProcess, device: Device) -> None:
    folder = coordinator.data
    stored = b"".join(path.read_bytes() for path in folder.glob("coordinator.sqlite*"))
    assert device.id.encode() in stored
    assert device.credential.encode() not in stored
    assert (folder / "join-token").stat().st_mode & 0o077 == 0


# --- asking ---------------------------------------------------------------------------------------


def test_a_device_that_asks_twice_has_one_assignment(device: Device) -> None:
    first, again = device.work(), device.work()
    assert first.expires_in_s >= again.expires_in_s
    assert (first.id, first.seed, first.version) == (again.id, again.seed, again.version)


def test_a_rank_off_the_ladder_is_refused(device: Device) -> None:
    with pytest.raises(ProtocolError, match=r"Ask.rank: 3 is not on the ladder \[2, 4, 8\]"):
        device.transport.ask(Ask(3))


def test_another_devices_assignment_is_not_found(coordinator: CoordinatorProcess, device: Device) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 0), SCALING)
    with member(coordinator, "cellar") as other:
        for attempt in (
            lambda: other.transport.heartbeat(work.id, Heartbeat(1)),
            lambda: other.send(work, content),
            lambda: other.transport.deliver(work.id, update_of(content, 4)),
        ):
            with pytest.raises(NotFound):
                attempt()


def test_a_contribution_is_followed_by_not_now(device: Device) -> None:
    device.hand_in(device.work(), seed=1)
    assert device.waits()


def test_a_heartbeat_shows_in_the_status(device: Device) -> None:
    work = device.work()
    assert device.transport.heartbeat(work.id, Heartbeat(7)).directive == "continue"
    (shown,) = [known for known in device.status().devices if known.id == device.id]
    assert (shown.state, shown.rank, shown.steps_done) == ("training", 4, 7)


def test_a_start_is_named_by_what_it_holds(merging: CoordinatorProcess) -> None:
    with member(merging) as device:
        first = device.work()
        assert (first.version, first.start, device.status().start) == (0, "", "")
        device.hand_in(first)
        wait_for_version(device, 1)
        second = device.work()
        (blob,) = [path for path in (merging.data / "blobs").rglob(f"{second.start}*") if path.is_file()]
        assert len(second.start) == 16
        assert codec.sha256_file(blob).startswith(second.start)
        assert device.status().start == second.start


# --- uploading ------------------------------------------------------------------------------------


def raw_upload(coordinator: CoordinatorProcess, device: Device, route: str, length: int) -> socket.socket:
    """A connection that has announced a body of `length` bytes from offset 0."""
    connection = socket.create_connection(("127.0.0.1", coordinator.port), timeout=30.0)
    connection.sendall(
        f"PATCH {route} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {device.credential}\r\n"
        f"Upload-Offset: 0\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


def offset(coordinator: CoordinatorProcess, device: Device, route: str) -> int:
    return int(request(coordinator, "HEAD", route, device.credential).headers[messages.UPLOAD_OFFSET])


def test_an_upload_goes_on_where_a_cut_connection_left_it(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    work = device.work()
    route = messages.UPLOAD.format(id=work.id)
    content = codec.encode(random_adapter(4, 2), SCALING)
    half = len(content) // 2
    connection = raw_upload(coordinator, device, route, len(content))
    connection.sendall(content[:half])
    deadline = time.monotonic() + 30.0
    while offset(coordinator, device, route) < half:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Reset instead of a polite close, as when a laptop goes to sleep.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert offset(coordinator, device, route) == half
    device.hand_in(work, content)
    assert device.waits()


def test_the_wrong_offset_is_refused_with_the_right_one(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    route = messages.UPLOAD.format(id=device.work().id)
    for wrong, stored in ((5, 0), (0, 3), (10**14, 3)):
        if stored == 3 and wrong == 0:
            start = {messages.UPLOAD_OFFSET: "0"}
            request(coordinator, "PATCH", route, device.credential, headers=start, content=b"abc")
        headers = {messages.UPLOAD_OFFSET: str(wrong)}
        refusal = request(coordinator, "PATCH", route, device.credential, headers=headers, content=b"xyz")
        document = problem(refusal, 409)
        assert document["offset"] == stored
        assert document["title"] == OffsetConflict.title
    for no_number in ("", "-1", "1e3", "٣", "9" * 20):
        headers_raw = {messages.UPLOAD_OFFSET: no_number.encode()}
        problem(
            request(coordinator, "PATCH", route, device.credential, headers=headers_raw, content=b"x"), 400
        )
    assert offset(coordinator, device, route) == 3


def test_the_transport_finds_the_right_offset_by_itself(device: Device) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 3), SCALING)
    device.send(work, content[:100])
    device.hand_in(work, content)


def test_bytes_that_arrive_late_from_a_cut_connection_cost_another_question(
    coordinator: CoordinatorProcess, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 13), SCALING)
    (tmp_path / "adapter").write_bytes(content)
    route = messages.UPLOAD.format(id=work.id)
    asked: list[str] = []
    ask_and_send = device.transport._send

    def meanwhile(method: str, *arguments: Any, **more: Any) -> httpx.Response:
        answer = ask_and_send(method, *arguments, **more)
        if method == "HEAD" and not asked:
            start = {messages.UPLOAD_OFFSET: "0"}
            request(coordinator, "PATCH", route, device.credential, headers=start, content=content[:50])
        asked.append(method)
        return answer

    monkeypatch.setattr(device.transport, "_send", meanwhile)
    device.transport.upload(work.id, tmp_path / "adapter")
    assert asked == ["HEAD", "HEAD", "PATCH"]  # the refused one raised
    device.transport.deliver(work.id, update_of(content, 4))


def test_a_body_over_the_cap_is_refused_and_not_stored(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    work = device.work()
    route = messages.UPLOAD.format(id=work.id)
    cap = codec.max_adapter_bytes(SHAPES, 4)
    connection = raw_upload(coordinator, device, route, 100 << 20)
    sent = 0
    try:
        while sent < 100 << 20:
            sent += connection.send(b"\0" * (1 << 20))
    except OSError:
        pass  # the coordinator has hung up; or it reads on and drops what it reads
    finally:
        connection.close()
    assert offset(coordinator, device, route) <= cap
    stored = sum(path.stat().st_size for path in coordinator.data.rglob("*") if path.is_file())
    assert stored < 10 << 20


def test_a_body_that_says_it_is_over_the_cap_gets_a_problem_document(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    route = messages.UPLOAD.format(id=device.work().id)
    connection = raw_upload(coordinator, device, route, 10 << 30)
    answer = connection.recv(4096).decode()
    connection.close()
    assert answer.startswith("HTTP/1.1 413")
    assert '"title": "too large"' in answer


def test_a_claimed_size_over_the_cap_is_refused(device: Device) -> None:
    work = device.work()
    claim = messages.Update("ab" * 32, 10 << 30, 4, 10, 20, 2.5, 1.5, 3.0)
    with pytest.raises(TooLarge, match="Update.size_bytes"):
        device.transport.deliver(work.id, claim)


# --- delivering -----------------------------------------------------------------------------------


def test_a_forged_digest_is_refused_and_the_upload_starts_over(device: Device) -> None:
    work = device.work()
    content, other = (codec.encode(random_adapter(4, seed), SCALING) for seed in (4, 5))
    device.send(work, other)
    with pytest.raises(ProtocolError, match="upload again"):
        device.transport.deliver(work.id, update_of(content, 4))
    device.hand_in(work, content)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "AB" * 32])
def test_a_digest_that_is_none_is_refused(device: Device, digest: str) -> None:
    work = device.work()
    with pytest.raises(ProtocolError, match="Update.digest: must be text of the form"):
        device.transport.deliver(work.id, messages.Update(digest, 10, 4, 10, 20, 2.5, 1.5, 3.0))


def test_delivering_before_uploading_is_refused(device: Device) -> None:
    work = device.work()
    with pytest.raises(ProtocolError, match="nothing was uploaded"):
        device.transport.deliver(work.id, update_of(b"never sent", 4))


def broken(kind: str) -> tuple[bytes, str]:
    """A bad adapter for an assignment of rank 4, and what is said about it."""
    adapter = random_adapter(4, 6)
    name = "model.layers.0.q_proj"
    good = adapter[name]
    if kind == "not finite":
        b = good.b.copy()
        b[3, 1] = np.nan
        return codec.encode(adapter | {name: LoraFactors(b, good.a)}, SCALING), "not finite"
    if kind == "overflowing":
        return codec.encode(adapter | {name: LoraFactors(good.b * 1e37, good.a * 1e37)}, SCALING), "norm"
    if kind == "another shape":
        return codec.encode(
            adapter | {name: LoraFactors(good.b[:-1], good.a)}, SCALING
        ), r"expected \[24, 4\]"
    if kind == "another rank":
        return codec.encode(random_adapter(8, 6), SCALING), "expected|needs"
    if kind == "a module less":
        return codec.encode({k: v for k, v in adapter.items() if k != name}, SCALING), f"{name} is missing"
    if kind == "a stranger's module":
        return codec.encode(adapter | {"lm_head": good}, SCALING), "lm_head|needs"
    if kind == "nothing":
        return b"\0", "not a safetensors file"
    return os.urandom(1000), "not a safetensors file"


@pytest.mark.parametrize(
    "kind",
    [
        "not finite",
        "overflowing",
        "another shape",
        "another rank",
        "a module less",
        "a stranger's module",
        "nothing",
        "nonsense",
    ],
)
def test_a_bad_adapter_is_refused_and_a_good_one_still_welcome(device: Device, kind: str) -> None:
    work = device.work()
    content, reason = broken(kind)
    with pytest.raises((AdapterError, TooLarge), match=reason):
        device.hand_in(work, content)
    device.hand_in(work, seed=7)


def test_the_claims_must_be_those_of_the_assignment(device: Device) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 8), SCALING)
    device.send(work, content)
    with pytest.raises(ProtocolError, match=r"Update.rank: 8, but rank 4 was assigned"):
        device.transport.deliver(work.id, update_of(content, 8))
    with pytest.raises(ProtocolError, match="Update.examples"):
        device.transport.deliver(work.id, update_of(content, 4, examples=0))
    device.transport.deliver(work.id, update_of(content, 4))


def test_a_lower_rank_than_assigned_is_merged_as_what_it_is(merging: CoordinatorProcess) -> None:
    """A device that ran out of memory hands in less: uniformly, or unequal ranks of two kinds of module."""
    with member(merging, "one") as one:
        before = one.status().version
        work = one.work(rank=8)
        one.hand_in(work, seed=21, rank=2)
        wait_for_version(one, before + 1)
        assert one.status().version_ranks[str(before + 1)] >= 2

        work = one.work(rank=8)
        wide, narrow = random_adapter(4, 22), random_adapter(1, 22)
        mixed = {name: (narrow if "q_proj" in name else wide)[name] for name in wide}
        one.hand_in(work, codec.encode(mixed, SCALING), rank=4)
        wait_for_version(one, before + 2)

        work = one.work(rank=4)
        with pytest.raises(AdapterError, match="q_proj.lora_A.weight has shape"):  # more than it says
            one.hand_in(work, codec.encode(random_adapter(4, 23), SCALING), rank=2)
        with pytest.raises(ProtocolError, match=r"Update.rank: must be 1 to 65536, got 0"):
            one.transport.deliver(work.id, update_of(codec.encode(random_adapter(4, 23), SCALING), 0))


def test_a_repeated_delivery_gets_the_same_answer_and_counts_once(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 9), SCALING)
    before = device.status().buffered
    assert device.hand_in(work, content) == device.hand_in(work, content)
    assert device.status().buffered == before + 1
    assert not (coordinator.data / "uploads" / f"{work.id}.part").exists()  # sent again for nothing
    with pytest.raises(ProtocolError, match="was delivered before"):
        device.hand_in(work, seed=10)


def test_claiming_anothers_adapter_at_the_wrong_rank_does_not_delete_it(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    work = device.work()
    content = codec.encode(random_adapter(4, 11), SCALING)
    device.hand_in(work, content)
    digest = update_of(content, 4).digest
    blob = coordinator.data / "blobs" / digest[:2] / digest
    with member(coordinator, "thief") as other:
        theirs = other.work(rank=8)
        with pytest.raises(AdapterError):
            other.transport.deliver(theirs.id, update_of(content, 8))
    assert blob.read_bytes() == content


def test_two_devices_may_hand_in_the_same_bytes(coordinator: CoordinatorProcess, device: Device) -> None:
    content = codec.encode(random_adapter(4, 12), SCALING)
    before = device.status().buffered
    with member(coordinator, "twin") as twin:
        for one in (device, twin):
            one.hand_in(one.work(), content)
    assert device.status().buffered == before + 2


# --- downloading ----------------------------------------------------------------------------------


def test_a_stop_when_all_has_come_leaves_the_whole_file(merging: CoordinatorProcess, tmp_path: Path) -> None:
    """There would be nothing left to ask for: the next attempt would be refused."""
    with member(merging) as device:
        device.transport.download(0, 4, tmp_path / "file", stopping=lambda: True, most_bytes=MOST_BYTES)
        whole = codec.open_adapter(tmp_path / "file", SHAPES, 4, SCALING, 10**6)
        assert set(dict(whole.modules())) == set(SHAPES)


def test_every_device_of_a_rank_gets_the_same_bytes(merging: CoordinatorProcess, tmp_path: Path) -> None:
    with member(merging, "one") as one, member(merging, "two") as two:
        one.hand_in(one.work(), seed=1)
        wait_for_version(one, 1)
        files = [tmp_path / name for name in ("one", "two")]
        for device, file in zip((one, two), files, strict=True):
            device.transport.download(1, 4, file, most_bytes=MOST_BYTES)
        content = files[0].read_bytes()
        assert content == files[1].read_bytes()
        served = dict(codec.open_adapter(files[0], SHAPES, 4, SCALING, 10**6).modules())
        for name, sent in random_adapter(4, 1).items():
            np.testing.assert_allclose(served[name].product(), sent.product(), atol=1e-5)

        route = messages.ADAPTER.format(version=1, rank=4)
        whole = request(merging, "GET", route, one.credential)
        tag = whole.headers["ETag"]
        part = request(merging, "GET", route, one.credential, headers={"Range": "bytes=100-299"})
        assert part.status_code == 206
        assert part.content == content[100:300]
        assert part.headers["Content-Range"] == f"bytes 100-299/{len(content)}"
        rest = request(
            merging, "GET", route, two.credential, headers={"Range": "bytes=100-", "If-Range": tag}
        )
        assert rest.content == content[100:]
        same = request(merging, "GET", route, two.credential, headers={"If-None-Match": tag})
        assert (same.status_code, same.content) == (304, b"")

        config = request(merging, "GET", messages.ADAPTER_CONFIG.format(version=1, rank=4), one.credential)
        assert (config.json()["r"], config.json()["lora_alpha"]) == (4, 8.0)


def test_a_broken_download_goes_on_where_it_stopped(merging: CoordinatorProcess, tmp_path: Path) -> None:
    with member(merging) as device:
        whole, again = tmp_path / "whole", tmp_path / "again"
        device.transport.download(0, 4, whole, most_bytes=MOST_BYTES)
        content = whole.read_bytes()
        route = messages.ADAPTER.format(version=0, rank=4)
        tag = request(merging, "GET", route, device.credential).headers["ETag"]
        # A bit that is another in front shows that only the rest was fetched.
        other = content[:-12] + bytes([content[-12] ^ 1])
        (tmp_path / "again.part").write_bytes(other)
        (tmp_path / "again.part.etag").write_text(tag)
        device.transport.download(0, 4, again, most_bytes=MOST_BYTES)
        assert again.read_bytes() == other + content[-11:]
        assert sorted(path.name for path in tmp_path.glob("again*")) == ["again"]


@pytest.mark.parametrize(
    "route",
    [
        "/v1/versions/1/ranks/4/adapter_model.safetensors",
        "/v1/versions/0/ranks/13/adapter_model.safetensors",
        "/v1/versions/0/ranks/0/adapter_config.json",
        "/v1/versions/-1/ranks/4/adapter_model.safetensors",
        "/v1/versions/0/ranks/x/adapter_config.json",
        "/v1/versions/0/ranks/9999999999999/adapter_config.json",
        "/v1/versions/0/ranks/4/join-token",
        "/v1/assignments/%2e%2e%2fjoin-token/adapter",
        "/v1/../join-token",
        "/",
        "/v2/join",
    ],
)
def test_what_is_not_there_is_a_problem_document(
    coordinator: CoordinatorProcess, device: Device, route: str
) -> None:
    method = "PATCH" if route.endswith("/adapter") else "GET"
    document = problem(request(coordinator, method, route, device.credential), 404)
    assert document["title"] == "not found"


def test_the_wrong_method_is_a_problem_document(coordinator: CoordinatorProcess, device: Device) -> None:
    problem(request(coordinator, "DELETE", messages.STATUS, device.credential), 405)


# --- hostile bodies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"{}", 400),
        (b'{"rank": "4"}', 400),
        (b'{"rank": 4.0}', 400),
        (b'{"rank": true}', 400),
        (b'{"rank": NaN}', 400),
        (b'{"rank": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 60_000, 400),
        (b'{"rank": 4, "more": "' + b"x" * (64 << 10) + b'"}', 413),
    ],
)
def test_a_malformed_record_is_refused(
    coordinator: CoordinatorProcess, device: Device, body: bytes, status: int
) -> None:
    problem(request(coordinator, "POST", messages.ASSIGNMENTS, device.credential, content=body), status)


def test_a_charset_that_nobody_knows_is_no_fault_of_ours(
    coordinator: CoordinatorProcess, device: Device
) -> None:
    headers = {"Content-Type": "application/json; charset=klingon"}
    answer = request(
        coordinator, "POST", messages.ASSIGNMENTS, device.credential, headers=headers, content=b'{"rank": 4}'
    )
    assert answer.status_code == 200


@pytest.mark.parametrize("name", ["\\ud800", "\\u0000", "x" * 5000])
def test_a_strange_name_harms_nobody(coordinator: CoordinatorProcess, name: str) -> None:
    body = f'{{"name": "{name}", "fingerprint": "{FINGERPRINT}"}}'.encode()
    answer = request(coordinator, "POST", messages.JOIN, coordinator.join_token, content=body)
    assert answer.status_code in (201, 400), answer.text
    assert request(coordinator, "GET", messages.STATUS, coordinator.host_token).status_code == 200


def test_a_newer_protocol_is_refused_by_name(coordinator: CoordinatorProcess) -> None:
    body = json.dumps({"name": "attic", "fingerprint": FINGERPRINT, "protocol": 2})
    answer = request(coordinator, "POST", messages.JOIN, coordinator.join_token, content=body)
    assert "protocol" in problem(answer, 400)["detail"]


def test_slow_senders_hold_nobody_up(coordinator: CoordinatorProcess, device: Device) -> None:
    slow = []
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", coordinator.port), timeout=30.0)
        connection.sendall(
            b"POST /v1/assignments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + device.credential.encode() + b'\r\nContent-Length: 100\r\n\r\n{"rank'
        )
        slow.append(connection)
    began = time.monotonic()
    device.hand_in(device.work(), seed=20)
    assert time.monotonic() - began < 5.0
    for connection in slow:
        connection.close()


def test_devices_do_not_wait_for_each_other(coordinator: CoordinatorProcess) -> None:
    answers: list[str] = []

    def take_part(number: int) -> None:
        with member(coordinator, f"device {number}") as one:
            work = one.work(rank=LADDER[number % 3])
            answers.append(one.hand_in(work, seed=100 + number).update_id)

    threads = [threading.Thread(target=take_part, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 12
