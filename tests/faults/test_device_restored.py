"""A coordinator that comes back as it was yesterday, one that says `finish`, and a clock that jumps."""

from __future__ import annotations

import ast
import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.core.errors import Unauthorised
from edge_sdk.core.messages import Base
from edge_sdk.model import base_model
from edge_sdk.options import Event, Options
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.participation.resident_model import worker_for
from tests.device_agents import Device, device, federation_config, quick, text_of, updates
from tests.faults.proxy import Answer, Proxy
from tests.models import build_model
from tests.processes import ROOT, CoordinatorProcess
from tests.test_federation import wait_for_version

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

STEPS = 4
FINISH = Answer(200, {"Content-Type": "application/json"}, b'{"directive": "finish"}')


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_of(tmp_path_factory.mktemp("data"))


@pytest.fixture
def coordinator(tmp_path: Path, base: Base) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path, federation_config(tmp_path, base, STEPS)) as process:
        yield process


def trained(it: Device, count: int) -> None:
    """So many updates, each merged before the next."""
    for _ in range(count):
        before = it.agent.transport.newest().version if it.events else 0
        assert it.agent.run(updates=1) == 1
        wait_for_version(it.agent, before + 1)


def served_here(it: Device) -> set[str]:
    """The adapter files that a device has, by their names without the federation."""
    return {path.name.split("-", 1)[1] for path in it.agent.journal.adapters.glob("*.safetensors")}


# --- a coordinator restored from an older copy ------------------------------------------------------


def test_devices_go_on_with_a_coordinator_that_was_restored(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Three versions, then the copy of after the first; the device hears of version 1 again and goes on.

    Its next "version 2" is another one, and is fetched although a file of a version 2 is here.
    """
    red = device(coordinator.url, coordinator.join_token, tmp_path / "red", data)
    trained(red, 1)
    coordinator.stop()
    shutil.copytree(coordinator.data, tmp_path / "copy")
    coordinator.start()
    trained(red, 2)
    blue = device(coordinator.url, coordinator.join_token, tmp_path / "blue", data)
    stranger = device(coordinator.url, coordinator.join_token, tmp_path / "stranger", data)
    for it in (blue, stranger):
        it.agent.prepare()
    assert red.agent.refresh() == 3
    lost = served_here(red)
    assert {name.split("-")[0] for name in lost} == {"2", "3"}

    coordinator.stop()
    shutil.rmtree(coordinator.data)
    shutil.move(tmp_path / "copy", coordinator.data)
    coordinator.start()
    red.clock.forward()
    assert red.agent.refresh() == 1  # what answers is what the federation has
    trained(red, 2)
    red.clock.forward()
    assert red.agent.refresh() == 3
    again = served_here(red)
    assert not again & lost
    version, adapter = red.agent.newest()
    assert (version, adapter is not None) == (3, True)
    assert len(updates(coordinator, red.id)) == 3
    # A copy that runs besides would look the same, so both sides are told, once, and work goes on.
    (told,) = red.texts("notice")
    assert "has worked with another coordinator of this federation (run 2-" in told
    log = coordinator.log.read_text()
    assert log.count(f"device {red.id} has worked with another coordinator") == 1

    # Devices that joined after the copy was made are not known: one that has the join token joins anew.
    old = blue.id
    assert blue.agent.run(updates=1) == 1
    assert blue.id != old
    assert blue.texts("notice") == ["the coordinator does not know this device any more; it joins anew"]
    assert f"device {blue.id} has worked with another coordinator" in coordinator.log.read_text()
    again_without = device(coordinator.url, None, tmp_path / "stranger", data)
    with pytest.raises(Unauthorised, match="join again with an invitation"):
        again_without.agent.run(updates=1)
    for it in (red, blue, stranger, again_without):
        it.agent.close()


def test_work_that_a_restored_coordinator_does_not_know_is_dropped(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Restored while a device trains: its next heartbeat finds nobody who knows the assignment."""
    restored = threading.Event()

    def listen(event: Event) -> None:
        if (
            event.kind == "step"
            and event.step == 1
            and (tmp_path / "copy").exists()
            and not restored.is_set()
        ):
            restored.set()
            coordinator.kill()
            shutil.rmtree(coordinator.data)
            shutil.copytree(tmp_path / "copy", coordinator.data)
            coordinator.start()

    it = device(coordinator.url, coordinator.join_token, tmp_path / "device", data, listen)
    trained(it, 1)
    coordinator.stop()
    shutil.copytree(coordinator.data, tmp_path / "copy")
    coordinator.start()
    assert it.agent.run(updates=1) == 1
    assert restored.is_set()
    (refused,) = it.texts("refused")
    assert "the coordinator does not know this work any more" in refused
    assert len(updates(coordinator, it.id)) == 2
    it.agent.close()


def test_a_coordinator_of_before_starts_is_worked_with(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records hold no `start`: files are named by version and rank alone."""
    from edge_sdk.connection import transport

    decode = transport.decode

    def without(kind: type, content: bytes) -> object:
        return decode(kind, json.dumps({k: v for k, v in json.loads(content).items() if k != "start"}))

    monkeypatch.setattr(transport, "decode", without)
    it = device(coordinator.url, coordinator.join_token, tmp_path / "device", data)
    trained(it, 2)
    assert it.agent.refresh() == 2
    assert served_here(it) == {"1-8.safetensors", "2-8.safetensors"}
    it.agent.close()


# --- finish -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard_after", [1, 3])
def test_a_device_told_to_finish_hands_in_what_it_has(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, heard_after: int
) -> None:
    """The word comes with the answer to the nth heartbeat, which is that of the nth step."""
    with Proxy(coordinator.port) as proxy:
        rule = proxy.on("POST", "/heartbeat$", FINISH, nth=heard_after)
        it = device(proxy.url, coordinator.join_token, tmp_path / "device", data)
        assert it.agent.run(updates=1) == 1
        it.agent.close()
        assert rule.triggered == 1
    steps = [event.step for event in it.events if event.kind == "step"]
    losses = [event.loss for event in it.events if event.kind == "step"]
    assert steps == list(range(1, heard_after + 1))
    (update,) = updates(coordinator, it.id)
    assert (update["steps"], update["examples"]) == (heard_after, 2 * heard_after)
    assert (update["loss_before"], update["loss_after"]) == (losses[0], losses[-1])


def test_a_worker_process_told_to_finish_hands_in_what_it_has(tmp_path: Path, base: Base, data: Path) -> None:
    """A real deadline of a real coordinator, on a device that is late; training is in its own process."""

    def apart(federation: Any, options: Options, data: Path, decision: Any) -> Any:
        return worker_for(federation, replace(options, isolate=True), data, decision)

    config = federation_config(tmp_path, base, steps=100_000, lease_s=1.0, max_staleness=1000)
    with CoordinatorProcess(tmp_path, config) as coordinator:
        it = device(
            coordinator.url,
            coordinator.join_token,
            tmp_path / "device",
            data,
            collaborators=Collaborators(make_worker=apart),
        )
        assert it.agent.run(updates=1) == 1
        it.agent.close()
        (update,) = updates(coordinator, it.id)
    last = max(event.step for event in it.events if event.kind == "step")
    assert 1 <= update["steps"] < 100_000
    assert update["steps"] in (last, last + 1)  # the last report may come after the result
    assert update["examples"] == 2 * update["steps"]


# --- clocks -----------------------------------------------------------------------------------------


def test_a_clock_that_jumps_by_years_changes_nothing(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, itertools.cycle([0.0, 1e9, -1e9])
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    it = device(coordinator.url, coordinator.join_token, tmp_path / "device", data)
    trained(it, 2)
    assert it.texts("offline", "refused", "disk") == []
    assert len(updates(coordinator, it.id)) == 2
    it.agent.close()


WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.strftime"}
WALL_CLOCK |= {"datetime.datetime.now", "datetime.datetime.utcnow", "datetime.date.today"}
MAY_READ_IT = {
    "join.py": {"time.strftime"},  # in front of a line that a person reads
    "federation_checks.py": {"time.time"},  # the doctor says whether the clock is right
    "surroundings.py": {"datetime.datetime.now"},  # the owner's hours are hours of the clock
}


def test_no_decision_hangs_on_the_wall_clock() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "edge_sdk").rglob("*.py")):
        names = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        if names & WALL_CLOCK:
            found[path.name] = names & WALL_CLOCK
    assert found == MAY_READ_IT
