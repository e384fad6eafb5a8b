"""Members that want others' turns or time: they ask and never work, hand in nothing at once, hoard leases."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from edge_sdk.core.adapter_file.codec import encode
from edge_sdk.core.records import to_json
from tests.coordinator.devices import SCALING, random_adapter, update_of
from tests.faults.outside import rows
from tests.hostile.harness import GoodDevice, Target, attacked
from tests.processes import PATIENCE_S

ZEROS = encode(random_adapter(4, 0, 0.0), SCALING)


@contextlib.contextmanager
def meanwhile(target: Target, count: int, act: Callable[[GoodDevice, int], None]) -> Iterator[None]:
    """So many members that do the same over and over, each in a thread."""
    over = threading.Event()

    def live(number: int) -> None:
        with contextlib.closing(target.device(f"hostile {number}")) as device:
            step = 0
            while not over.wait(0.05):
                act(device, step)
                step += 1

    with ThreadPoolExecutor(count) as threads:
        lives = [threads.submit(live, number) for number in range(count)]
        try:
            time.sleep(1.0)  # they come first
            yield
        finally:
            over.set()
            for one in lives:
                one.result()


def hand_in(device: GoodDevice, assignment: str, content: bytes) -> httpx.Response:
    device.patch(assignment, content)
    record = to_json(update_of(content, 4))
    return device.http.post(f"/v1/assignments/{assignment}/update", json=record)


def ask_only(device: GoodDevice, step: int) -> None:
    device.ask(2 if step // 20 % 2 else 4)


SLOTS: dict[str, object] = {"concurrency": 2, "buffer_size": 2, "quorum": 1, "timeout_s": 2.0}
ROUNDS: dict[str, object] = {"mode": "synchronous", "buffer_size": 2, "quorum": 1, "timeout_s": 2.0}


@pytest.mark.parametrize("policy", [SLOTS, ROUNDS])
def test_members_that_ask_and_never_work(tmp_path: Path, policy: dict[str, object]) -> None:
    with (
        attacked(tmp_path, policy | {"first_lease_s": 1.0, "lease_s": 20.0}) as target,
        contextlib.closing(target.device("honest")) as honest,
        meanwhile(target, 6, ask_only),
    ):
        begun = time.monotonic()
        target.acknowledged += [honest.hand_in(seed) for seed in range(5)]
        assert time.monotonic() - begun < PATIENCE_S / 2


def hand_in_zeros(device: GoodDevice, step: int) -> None:
    answer = device.ask()
    if answer.status_code == 200:
        hand_in(device, answer.json()["id"], ZEROS)


def test_members_that_hand_in_zeros_at_once(tmp_path: Path) -> None:
    """Beside devices that need seconds: none of these is told to abandon its work."""
    policy: dict[str, object] = {
        "buffer_size": 4,
        "lease_s": 60.0,
        "first_lease_s": 20.0,
        "timeout_s": 60.0,
        "max_staleness": 3,
    }

    def work_slowly(device: GoodDevice) -> None:
        for seed in range(3):
            assignment = device.work()
            for done in range(4, 20, 4):
                time.sleep(1.0)
                beat = device.http.post(f"/v1/assignments/{assignment}/heartbeat", json={"steps_done": done})
                assert beat.json()["directive"] == "continue"
            answer = hand_in(device, assignment, encode(random_adapter(4, seed, 0.01), SCALING))
            assert answer.status_code == 202, answer.text
            target.acknowledged.append(assignment)

    with attacked(tmp_path, policy) as target, contextlib.ExitStack() as stack:
        honest = [stack.enter_context(contextlib.closing(target.device(f"honest {n}"))) for n in range(3)]
        with ThreadPoolExecutor(3) as threads:
            working = [threads.submit(work_slowly, device) for device in honest]
            with meanwhile(target, 4, hand_in_zeros):
                for one in working:
                    one.result(PATIENCE_S)
    assert len(rows(target.coordinator.data, "SELECT version FROM versions")) >= 2


def test_leases_that_are_hoarded(tmp_path: Path) -> None:
    """Asked for at two ranks in turn and handed in together: they count as one, and so does the device."""
    with (
        attacked(tmp_path, {"buffer_size": 4, "first_lease_s": 1.0}) as target,
        contextlib.closing(target.device("hoarder")) as hoarder,
    ):
        hoard: list[str] = []
        while len(hoard) < 4:
            answer = hoarder.ask(2 + 2 * (len(hoard) % 2))
            if answer.status_code == 200:
                hoard.append(answer.json()["id"])
            time.sleep(0.1)
        contents = [encode(random_adapter(2 + 2 * (n % 2), n, 0.01), SCALING) for n in range(4)]
        for assignment, content in zip(hoard, contents, strict=True):
            hoarder.patch(assignment, content)
        statuses = []
        for number, (assignment, content) in enumerate(zip(hoard, contents, strict=True)):
            record = to_json(update_of(content, 2 + 2 * (number % 2)))
            statuses.append(
                hoarder.http.post(f"/v1/assignments/{assignment}/update", json=record).status_code
            )
        assert statuses == [409, 409, 409, 202]
        target.acknowledged.append(hoard[-1])
        assert hoarder.ask().status_code == 503
    owners = rows(target.coordinator.data, "SELECT device FROM updates WHERE rejected IS NULL")
    assert len(owners) == len(set(owners)) == 3
