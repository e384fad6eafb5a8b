"""Members that take more than their share of the disk, the memory or the coordinator's time."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import httpx

from coordinator.settings import load_base
from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.codec import encode
from tests.coordinator.devices import FINGERPRINT, SCALING, SHAPES, random_adapter
from tests.faults.outside import rows
from tests.hostile.harness import GoodDevice, Target, attacked, bearer
from tests.processes import CoordinatorProcess, command, toml

CONTENT = encode(random_adapter(8, 5, 0.01), SCALING)
SOON_S = 30.0


def join(target: Target, **record: object) -> httpx.Response:
    body = {"name": "one more", "fingerprint": FINGERPRINT} | record
    headers = bearer(target.coordinator.join_token)
    return httpx.post(f"{target.coordinator.url}/v1/join", json=body, headers=headers, timeout=60.0)


def is_told_to_wait(answer: httpx.Response) -> bool:
    """Whether it is a problem document that says for how long, in its body and in its head."""
    if answer.status_code != 429:
        return False
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    problem = answer.json()
    assert problem["title"] == "too many requests"
    assert 0.0 < problem["retry_after_s"] <= int(answer.headers["Retry-After"])
    return True


def test_devices_without_end(tmp_path: Path) -> None:
    """Those that are members already stay, and hand in their work."""
    with attacked(tmp_path, limits={"devices": 4}) as target, contextlib.closing(target.device()) as device:
        statuses = [join(target).status_code for _ in range(20)]
        assert statuses == [201] * 2 + [403] * 18  # beside this one and the harness's
        target.acknowledged.append(device.hand_in(3))
        (answer,) = {join(target).json()["title"]}
        assert answer == "federation full"
        count = rows(target.coordinator.data, "SELECT count(*) FROM devices")
        assert count == [(4,)]
        assert target.coordinator.stop() == 0  # the harness wants one more at the end
        text = target.coordinator.config.read_text()
        target.coordinator.config.write_text(text.replace("devices = 4", "devices = 5"))
        target.coordinator.start()


def test_joins_in_a_minute(tmp_path: Path) -> None:
    limits: dict[str, object] = {"joins_minute": 30, "joins_minute_of_address": 30}
    with attacked(tmp_path, limits=limits) as target:
        answers = [join(target) for _ in range(60)]
        assert all(answer.status_code == 201 or is_told_to_wait(answer) for answer in answers)
        assert 29 <= sum(answer.status_code == 201 for answer in answers) <= 45


def test_a_device_that_joins_among_many_waits_for_its_turn(tmp_path: Path) -> None:
    """It says so, and comes in by itself."""
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps({"text": f"a note of mine, number {n}"}) + "\n" for n in range(40)))
    sections: dict[str, dict[str, object]] = {
        "federation": {"ladder": [2]},
        "training": {"steps": 2, "batch": 8},
        "limits": {"joins_minute": 4, "joins_minute_of_address": 4},
    }
    with CoordinatorProcess(tmp_path, toml(sections, Path("tiny"))) as coordinator:
        fingerprint = load_base("tiny", tmp_path).fingerprint
        body, headers = {"name": "many", "fingerprint": fingerprint}, bearer(coordinator.join_token)
        while httpx.post(f"{coordinator.url}/v1/join", json=body, headers=headers).status_code == 201:
            pass
        arguments = ["join", coordinator.url, "--data", notes, "--token", coordinator.join_token]
        joined = command("edge_sdk.cli", *arguments, "--state", tmp_path / "state", "--updates", 1)
        assert joined.returncode == 0, joined.stderr
        assert "too many devices join at a time; try again later; trying again in" in joined.stdout


def test_profiles_as_large_as_a_record_may_be(tmp_path: Path) -> None:
    with attacked(tmp_path) as target:
        empty = len('{"note":""}')
        assert join(target, profile={"note": "x" * (4096 - empty)}).status_code == 201
        for size in (4097 - empty, 60_000):
            answer = join(target, profile={"note": "x" * size})
            assert answer.status_code == 413
            assert "4096" in answer.json()["detail"]
        database = target.coordinator.data / "coordinator.sqlite"
        assert database.stat().st_size < 1 << 20


def test_requests_of_one_device(tmp_path: Path) -> None:
    with (
        attacked(tmp_path, limits={"requests_s": 2.0}) as target,
        contextlib.closing(target.device("hostile")) as hostile,
        contextlib.closing(target.device("honest")) as honest,
    ):
        answers = [hostile.ask() for _ in range(30)]
        assert [answer.status_code for answer in answers[:20]] == [200] * 20
        assert any(map(is_told_to_wait, answers[20:]))
        target.acknowledged.append(honest.hand_in(3))
        time.sleep(answers[-1].json().get("retry_after_s", 0.0) + 0.6)
        assert hostile.ask().status_code == 200


def test_uploads_for_leases_that_are_given_up_at_once(tmp_path: Path) -> None:
    """A device may send so much in vain within an hour; what it hands in does not count as that."""
    policy: dict[str, object] = {"first_lease_s": 0.2, "buffer_size": 4}
    with (
        attacked(tmp_path, policy, limits={"wasted_uploads_hour": 3}) as target,
        contextlib.closing(target.device("hostile")) as hostile,
    ):
        sent, sent_bytes, statuses = 0.0, 0, []
        for step in range(20):
            answer = hostile.ask((2, 4, 8)[step % 3])
            if answer.status_code == 200:
                rank = answer.json()["rank"]
                content = encode(random_adapter(rank, step, 0.01), SCALING)
                statuses.append(hostile.patch(answer.json()["id"], content).status_code)
                if statuses[-1] == 204:
                    sent += len(content) / codec.max_adapter_bytes(SHAPES, rank, "int8")
                    sent_bytes += len(content)
            time.sleep(0.05)
        assert 429 in statuses
        assert 2.0 <= sent < 4.0  # beside what it costs to begin each
        assert held_bytes(target) <= sent_bytes + 3 * len(CONTENT)


def test_uploads_of_a_byte_for_leases_that_are_given_up(tmp_path: Path) -> None:
    """Each is a file and a row, and a lease with a byte in it costs no pause."""
    policy: dict[str, object] = {"first_lease_s": 0.2, "buffer_size": 4}
    with (
        attacked(tmp_path, policy, limits={"wasted_uploads_hour": 1}) as target,
        contextlib.closing(target.device("hostile")) as hostile,
    ):
        for step in range(60):
            answer = hostile.ask((2, 4, 8)[step % 3])
            if answer.status_code == 200:
                hostile.patch(answer.json()["id"], b"x")
        assert len(list((target.coordinator.data / "uploads").iterdir())) <= 10
        ((leases,),) = rows(target.coordinator.data, "SELECT count(*) FROM assignments")
        assert leases <= 15


def held_bytes(target: Target) -> int:
    return sum(path.stat().st_size for path in (target.coordinator.data / "uploads").iterdir())


def test_work_that_is_handed_in_may_be_as_much_as_it_likes(tmp_path: Path) -> None:
    policy: dict[str, object] = {"buffer_size": 1, "least_version_s": 0.0}
    with (
        attacked(tmp_path, policy, limits={"wasted_uploads_hour": 1}) as target,
        contextlib.closing(target.device("busy")) as device,
    ):
        target.acknowledged += [device.hand_in(seed) for seed in range(10, 18)]


def test_a_disk_without_the_room_that_merges_need(tmp_path: Path) -> None:
    """Nothing new is taken in, devices are told why, and a version is made of what is there."""
    with (
        attacked(tmp_path, {"timeout_s": 600.0, "buffer_size": 4, "quorum": 4}) as target,
        contextlib.ExitStack() as stack,
    ):
        devices = [stack.enter_context(contextlib.closing(target.device(f"d{n}"))) for n in range(3)]
        target.acknowledged += [device.hand_in(n) for n, device in enumerate(devices)]
        assert rows(target.coordinator.data, "SELECT count(*) FROM updates") == [(4,)]
        until_version(target, devices[0], 1)
        # From here on more must be free than the disk has.
        least = 2 * shutil.disk_usage(tmp_path).total
        assert target.coordinator.stop() == 0
        text = target.coordinator.config.read_text()
        target.coordinator.config.write_text(f"{text}[limits]\nleast_free_bytes = {least}\n")
        target.coordinator.start()
        refused = [join(target), devices[0].patch(devices[0].work(), CONTENT[:10])]
        for answer in refused:
            assert answer.status_code == 507, answer.text
            assert answer.json()["title"] == "disk full"
        assert target.coordinator.stop() == 0
        target.coordinator.config.write_text(text)
        target.coordinator.start()


def until_version(target: Target, device: GoodDevice, version: int) -> None:
    deadline = time.monotonic() + 60.0
    while not rows(target.coordinator.data, f"SELECT version FROM versions WHERE version = {version}"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_merge_goes_on_where_nothing_new_is_taken_in(tmp_path: Path) -> None:
    """Of updates that were acknowledged before the disk filled."""
    with (
        attacked(tmp_path, {"timeout_s": 2.0, "buffer_size": 8, "quorum": 1}) as target,
        contextlib.closing(target.device()) as device,
    ):
        device.work()
        assert target.coordinator.stop() == 0
        text = target.coordinator.config.read_text()
        least = 2 * shutil.disk_usage(tmp_path).total
        target.coordinator.config.write_text(f"{text}[limits]\nleast_free_bytes = {least}\n")
        target.coordinator.start()
        until_version(target, device, 1)
        assert target.coordinator.stop() == 0
        target.coordinator.config.write_text(text)
        target.coordinator.start()


def test_a_status_of_many_devices_comes_in_pages(tmp_path: Path) -> None:
    """And each is small, whoever leaves it unread."""
    with attacked(tmp_path, limits={"status_devices": 3}) as target:
        for _ in range(5):
            assert join(target).status_code == 201
        transport = Transport(target.coordinator.url, target.coordinator.host_token)
        try:
            whole = transport.status()
            assert (len(whole.devices), whole.pages) == (6, 1)
            sizes = [len(transport.glance(page).devices) for page in range(2)]
        finally:
            transport.close()
        assert sizes == [3, 3]
        url, headers = f"{target.coordinator.url}/v1/status", bearer(target.coordinator.host_token)
        assert httpx.get(url, params={"page": 2}, headers=headers).status_code == 404
        for wrong in ("-1", "1e3", "9" * 5000, "", "٣"):
            assert httpx.get(url, params={"page": wrong}, headers=headers).status_code == 400


def test_files_for_ranks_that_nobody_trains(tmp_path: Path) -> None:
    """A few of them are kept, whoever asks for however many; all are served."""
    with (
        attacked(tmp_path) as target,
        contextlib.closing(target.device("hostile")) as hostile,
    ):
        for rank in range(1, 13):
            for dtype in ("float32", "float16", "int8"):
                place = "adapter_model" if dtype == "float32" else f"{dtype}/adapter"
                path = f"/v1/versions/0/ranks/{rank}/{place}.safetensors"
                assert hostile.http.get(path).status_code == 200, path
        assert len(list((target.coordinator.data / "cache").iterdir())) <= 8 + 6


def test_a_flood_of_members_leaves_the_others_their_time(tmp_path: Path) -> None:
    """Eight that ask as fast as they can, each with connections of its own."""
    with attacked(tmp_path) as target, contextlib.ExitStack() as stack:
        hostile = [stack.enter_context(contextlib.closing(target.device(f"h{n}"))) for n in range(8)]
        over = threading.Event()

        def ask(device: GoodDevice) -> None:
            while not over.is_set():
                device.ask()

        threads = [threading.Thread(target=ask, args=(device,)) for device in hostile]
        for thread in threads:
            thread.start()
        try:
            assert target.serve(3) < SOON_S
        finally:
            over.set()
            for thread in threads:
                thread.join()
