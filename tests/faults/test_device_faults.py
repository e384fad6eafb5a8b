"""Every fault of a link at every step of an assignment: finished work arrives, once.

A real coordinator, agent and training, with a proxy between them that breaks things on purpose.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.connection import transport
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import Unreachable
from edge_sdk.core.messages import Base
from edge_sdk.model import base_model
from edge_sdk.options import Event
from edge_sdk.system.backoff import Backoff
from tests.device_agents import Device, device, federation_config, quick, text_of, updates, wait_until
from tests.faults.proxy import (
    Answer,
    BlackHole,
    CutAnswer,
    CutRequest,
    Delay,
    Duplicate,
    Fault,
    Garbage,
    Proxy,
    Spoil,
    Swallow,
    Throttle,
)
from tests.models import build_model
from tests.processes import MOST_BYTES, CoordinatorProcess

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

STEPS = 3
ASK = ("POST", "/assignments$")
DOWNLOAD = ("GET", "/versions/")
HEARTBEAT = ("POST", "/heartbeat$")
HEAD = ("HEAD", "/adapter$")
PATCH = ("PATCH", "/adapter$")
UPDATE = ("POST", "/update$")
EVERY_STEP = (ASK, DOWNLOAD, HEARTBEAT, HEAD, PATCH, UPDATE)

PORTAL = b"<html>Welcome to the hotel! Please log in.</html>"
PROBLEM = {"Content-Type": "application/problem+json"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Iterator[CoordinatorProcess]:
    folder = tmp_path_factory.mktemp("coordinator")
    with CoordinatorProcess(folder, federation_config(folder, base, STEPS)) as process:
        yield process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_of(tmp_path_factory.mktemp("data"))


@pytest.fixture
def proxy(coordinator: CoordinatorProcess) -> Iterator[Proxy]:
    with Proxy(coordinator.port) as found:
        yield found


def new_device(
    proxy: Proxy, coordinator: CoordinatorProcess, folder: Path, data: Path, **options: Any
) -> Device:
    return device(proxy.url, coordinator.join_token, folder / "device", data, **options)


def delivers_once(it: Device, coordinator: CoordinatorProcess) -> dict[str, Any]:
    """One update, of whole work, that makes a version; the state folder holds nothing of it any more."""
    try:
        assert it.agent.run(updates=1) == 1
    finally:
        it.agent.close()
    (update,) = updates(coordinator, it.id)
    assert (update["steps"], update["examples"]) == (STEPS, 2 * STEPS)
    wait_until(lambda: updates(coordinator, it.id)[0]["merged_version"])
    journal = it.agent.journal
    assert not journal.outbox.exists()
    assert not journal.checkpoint.exists()
    left = [
        path.name for path in journal.folder.rglob("*") if path.suffix in (".tmp", ".part", ".etag", ".new")
    ]
    assert left == []
    assert it.texts("refused") == []
    return update


def dated(seconds: int) -> dict[str, str]:
    """Retry-After as a date, in an answer whose own date is thirty years ago."""
    now = datetime.datetime(1996, 11, 6, 8, 49, 37, tzinfo=datetime.UTC)
    then = now + datetime.timedelta(seconds=seconds)
    return {"Date": format_datetime(now, usegmt=True), "Retry-After": format_datetime(then, usegmt=True)}


ANYWHERE: dict[str, Fault] = {
    "cut before the answer": CutAnswer(0),
    "cut within the answer": CutAnswer(20),
    "cut, no length": CutAnswer(20, hide_length=True),
    "reset within the answer": CutAnswer(20, reset=True),
    "500": Answer(500),
    "502": Answer(502),
    "503 with seconds": Answer(503, {"Retry-After": "1"}),
    "503 with a date": Answer(503, dated(1)),
    "429 without": Answer(429),
    "429 as a problem": Answer(429, PROBLEM, b'{"title": "slow down", "status": 429}'),
    "403 of a proxy": Answer(403),
    "404 of a proxy": Answer(404),
    "captive portal": Answer(200, {"Content-Type": "text/html"}, PORTAL),
    "redirect": Answer(302, {"Location": "http://portal.example/"}),
    "empty JSON": Answer(200, {"Content-Type": "application/json"}, b"{}"),
    "garbage": Garbage(),
    "swallowed": Swallow(),
    "twice, first answer": Duplicate(second=False),
    "twice, second answer": Duplicate(second=True),
    "late": Delay(0.3),
}


@pytest.mark.parametrize("fault", ANYWHERE.values(), ids=ANYWHERE)
def test_a_fault_at_every_step(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path, fault: Fault
) -> None:
    rules = [proxy.on(*step, fault) for step in EVERY_STEP]
    delivers_once(new_device(proxy, coordinator, tmp_path, data), coordinator)
    assert [rule.triggered for rule in rules] == [1] * len(EVERY_STEP)


def test_a_black_hole_at_every_step(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Nobody reads and nobody answers: each attempt is given up after a while, and tried again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "TIMEOUT", 0.7)
        patch.setattr(transport, "BEAT_TIMEOUT", 0.7)
        rules = [proxy.on(*step, BlackHole()) for step in EVERY_STEP]
        delivers_once(new_device(proxy, coordinator, tmp_path, data), coordinator)
    assert [rule.triggered for rule in rules] == [1] * len(EVERY_STEP)


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
def test_an_upload_that_breaks_goes_on_where_it_stopped(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path, reset: bool
) -> None:
    """Broken twice, at 10 kB and at 10 kB more: all but what was in flight counts."""
    rule = proxy.on(*PATCH, CutRequest(10_000, reset), times=2)
    it = new_device(proxy, coordinator, tmp_path, data)
    update = delivers_once(it, coordinator)
    assert rule.triggered == 2
    assert update["size_bytes"] > 30_000
    assert len(proxy.asked(*PATCH)) == 3


def test_an_upload_that_the_coordinator_has_is_not_sent_again(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """The acknowledgement is lost three times; the adapter travels once."""
    rule = proxy.on(*UPDATE, Swallow(), times=3)
    delivers_once(new_device(proxy, coordinator, tmp_path, data), coordinator)
    assert rule.triggered == 3
    assert len(proxy.asked(*PATCH)) == 1


def test_an_upload_that_arrives_damaged_is_sent_again(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    rule = proxy.on(*PATCH, Spoil(at_byte=20_000))
    it = new_device(proxy, coordinator, tmp_path, data)
    delivers_once(it, coordinator)
    assert rule.triggered == 1
    assert any("did not arrive as it was sent" in text for text in it.texts("offline"))


def test_a_slow_link_carries_it_all_the_same(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """At 10 KB/s both ways a transfer takes longer than any time-out; none is given up and sent again."""
    rules = [proxy.on(*step, Throttle(10_000), times=99) for step in (DOWNLOAD, PATCH)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "TIMEOUT", 1.5)
        for name in ("PIECE_BYTES", "LEAST_PIECE_BYTES", "MOST_PIECE_BYTES"):
            patch.setattr(transport, name, 4096)
        it = new_device(proxy, coordinator, tmp_path, data, ranks=Ranks.uniform(2))
        update = delivers_once(it, coordinator)
    assert update["size_bytes"] / 10_000 > 1.5
    assert rules[0].triggered == 1
    assert rules[1].triggered == math.ceil(update["size_bytes"] / 4096)
    assert it.texts("offline") == []


# --- downloads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["cut", "reset"])
def test_a_download_that_breaks_goes_on_where_it_stopped(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path, reset: bool
) -> None:
    rule = proxy.on(*DOWNLOAD, CutAnswer(10_000, reset), times=2)
    delivers_once(new_device(proxy, coordinator, tmp_path, data), coordinator)
    assert rule.triggered == 2
    asked = proxy.asked(*DOWNLOAD)
    assert len(asked) == 3
    if not reset:  # which may lose what is on its way
        assert [head.get("range") for head in asked] == ["", "bytes=10000-", "bytes=20000-"]
        assert asked[1].get("if-range") == asked[2].get("if-range") != ""


def test_a_continued_download_mixes_no_two_files(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Between two parts the file becomes another one of the same size: what was there is thrown away.

    The server ignores If-Range for tags, as aiohttp does, so that the device has to see it.
    """
    rule = proxy.on(*DOWNLOAD, CutAnswer(10_000))
    it = new_device(proxy, coordinator, tmp_path, data)
    it.agent.prepare()
    connection, path = it.agent.transport, tmp_path / "adapter"
    version = connection.newest().version
    with pytest.raises(Unreachable, match="no coordinator answers"):
        connection.download(version, 8, path, most_bytes=MOST_BYTES)
    assert rule.triggered == 1
    (cached,) = (coordinator.data / "cache").glob(f"*-{version}-8.safetensors")
    content = bytearray(cached.read_bytes())
    content[-4] ^= 1  # a bit of the last mantissa
    cached.write_bytes(content)
    with pytest.raises(Unreachable, match="of another file; it starts over"):
        connection.download(version, 8, path, most_bytes=MOST_BYTES)
    connection.download(version, 8, path, most_bytes=MOST_BYTES)
    assert path.read_bytes() == content
    assert [head.get("range") for head in proxy.asked(*DOWNLOAD)] == ["", "bytes=10000-", ""]
    it.agent.close()


DAMAGES: dict[str, Fault] = {
    "cut short, no length": CutAnswer(10_000, hide_length=True),
    "empty, no length": CutAnswer(0, hide_length=True),
    "its header": Spoil(at_byte=3, answer=True),
    "a name in its header": Spoil(at_byte=200, answer=True),
    "a page of a portal": Answer(200, {"Content-Type": "text/html"}, PORTAL * 2000),
}


@pytest.mark.parametrize("fault", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_download_is_never_trained_from(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path, fault: Fault
) -> None:
    rule = proxy.on(*DOWNLOAD, fault)
    it = new_device(proxy, coordinator, tmp_path, data)
    delivers_once(it, coordinator)
    assert rule.triggered == 1
    assert any("came damaged" in text for text in it.texts("offline"))


def test_a_file_that_a_power_cut_left_short_is_fetched_again(
    proxy: Proxy, coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    it: Device

    def stop_at_training(event: Event) -> None:
        if event.kind == "training":
            it.agent.request_stop()

    it = new_device(proxy, coordinator, tmp_path, data, on_event=stop_at_training)
    assert it.agent.run() == 0
    it.agent.close()
    assert len(proxy.asked(*DOWNLOAD)) == 1
    (path,) = it.agent.journal.adapters.iterdir()
    it = new_device(proxy, coordinator, tmp_path, data)
    path.write_bytes(path.read_bytes()[:-100])
    delivers_once(it, coordinator)
    assert len(proxy.asked(*DOWNLOAD)) == 2


# --- no busy loops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", EVERY_STEP, ids=" ".join)
def test_an_outage_is_asked_about_less_and_less(
    proxy: Proxy,
    coordinator: CoordinatorProcess,
    data: Path,
    tmp_path: Path,
    step: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten failures in a row at one step: each wait is drawn below a bound that doubles up to the most."""
    bounds: list[float] = []
    slept: list[float] = []
    next_s = Backoff.next_s

    def noted(backoff: Backoff, asked_s: float = 0.0) -> float:
        wait_s = next_s(backoff, asked_s)
        bounds.append(backoff.bound_s)
        slept.append(wait_s)
        return wait_s

    monkeypatch.setattr(Backoff, "next_s", noted)
    # Of a training so short that only its first heartbeat is sure to come.
    rule = proxy.on(*step, Answer(502), times=10 if step != HEARTBEAT else 1)
    delivers_once(new_device(proxy, coordinator, tmp_path, data), coordinator)
    assert rule.triggered == len(bounds) == rule.times
    assert bounds == [0.05, 0.1, 0.2, 0.4, *[0.5] * 6][: rule.times]
    assert all(0 <= wait_s <= bound for wait_s, bound in zip(slept, bounds, strict=True))
