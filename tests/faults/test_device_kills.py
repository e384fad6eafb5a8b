"""SIGKILL of a device at any moment: it goes on from its checkpoint, and finished work arrives once."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Base
from edge_sdk.membership.journal import Journal
from edge_sdk.model import base_model
from tests.device_agents import USUAL, device, federation_config, quick, text_of, updates, wait_until
from tests.device_zygote import Zygote, events_in, kill, lives
from tests.faults.proxy import Proxy, Throttle
from tests.models import build_model
from tests.processes import PATIENCE_S, CoordinatorProcess
from tests.test_federation import checkpointed_step

__all__ = ["quick"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that holds torch")

STEPS = 12


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture
def coordinator(tmp_path: Path, base: Base) -> Iterator[CoordinatorProcess]:
    config = federation_config(tmp_path, base, STEPS, checkpoint_s=0.001)
    with CoordinatorProcess(tmp_path, config) as process:
        yield process


class Victim:
    """One device, killed and started again on one state folder."""

    def __init__(self, zygote: Zygote, coordinator: CoordinatorProcess, url: str, folder: Path) -> None:
        self.state, self.data = folder / "device", text_of(folder)
        self.finished: dict[str, str] = {}  # assignment -> digest of what lay in the outbox at some kill
        self.hit: list[str] = []
        self._zygote, self._coordinator, self._url = zygote, coordinator, url
        self._logs: list[Path] = []

    def start(self, **more: Any) -> int:
        self._logs.append(self.state.with_name(f"log-{len(self._logs)}"))
        return self._zygote.start(
            url=self._url,
            token=self._coordinator.join_token,
            state=self.state,
            data=self.data,
            log=self._logs[-1],
            model=USUAL.model,
            **more,
        )

    @property
    def session(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.state / "session.json").read_text())
        except FileNotFoundError:
            return {"phase": "idle", "device_id": ""}
        return found

    def events(self) -> list[dict[str, Any]]:
        return events_in(self._logs[-1])

    def kill_when(self, moment: Callable[[], bool], later_s: float = 0.0) -> None:
        """Start it, kill it at a moment or a little later, and note what it was at."""
        checkpoint = self.state / "checkpoint.safetensors"
        before, reached = self.session, checkpointed_step(checkpoint)
        pid = self.start()
        deadline = time.monotonic() + PATIENCE_S
        while not moment():
            assert lives(pid), self.events()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(later_s)
        kill(pid)
        if before["phase"] == "training":
            taken = [event["step"] for event in self.events() if event["kind"] == "step"]
            # It went on from its checkpoint; after that of the last step with the next assignment.
            assert taken[:1] in ([], [reached % STEPS + 1])
        session = self.session
        self.hit.append(session["phase"])
        if session["phase"] == "outbox":
            self.finished[session["assignment"]["id"]] = session["update"]["digest"]

    def finish(self) -> list[dict[str, Any]]:
        """Let it deliver one more; then everything has arrived once, and nothing is left."""
        pid = self.start(updates=1)
        wait_until(lambda: not lives(pid))
        assert [event["text"] for event in self.events() if event["kind"] == "stopped"] == [
            "stopped after 1 updates"
        ]
        device_id = self.session["device_id"]
        wait_until(lambda: all(u["merged_version"] for u in updates(self._coordinator, device_id)))
        found = updates(self._coordinator, device_id)
        # One that is killed often is late and told to finish: fewer steps then, and counted as such.
        assert all(1 <= update["steps"] <= STEPS for update in found)
        assert all(update["examples"] == 2 * update["steps"] for update in found)
        assert self.session["delivered"] == len(found)
        arrived = {update["assignment"]: update["digest"] for update in found}
        assert self.finished.items() <= arrived.items()
        left = {path.name for path in self.state.iterdir()}
        assert not [
            name for name in left if name.endswith((".tmp", ".new")) or "box" in name or "check" in name
        ]
        return found


def partly_downloaded(victim: Victim) -> bool:
    return any(path.stat().st_size for path in victim.state.glob("adapters/*.part"))


def partly_uploaded(coordinator: CoordinatorProcess) -> bool:
    return any(path.stat().st_size for path in (coordinator.data / "uploads").glob("*.part"))


def test_kills_at_every_phase(zygote: Zygote, coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    """Within a download, a training, and an upload; each goes on where it was."""
    with Proxy(coordinator.port) as proxy:
        slow = [
            proxy.on(*step, Throttle(60_000), times=10**6) for step in (("GET", "/versions/"), ("PATCH", ""))
        ]
        victim = Victim(zygote, coordinator, proxy.url, tmp_path)
        victim.kill_when(lambda: partly_downloaded(victim))
        checkpoint = victim.state / "checkpoint.safetensors"
        victim.kill_when(lambda: checkpointed_step(checkpoint) >= 2)
        victim.kill_when(lambda: checkpointed_step(checkpoint) >= 7)
        victim.kill_when(lambda: partly_uploaded(coordinator))
        assert victim.hit == ["training", "training", "training", "outbox"]
        assert len(victim.finish()) == 1
        assert all(rule.triggered for rule in slow)
        ranges = [head.get("range") for head in proxy.asked("GET", "/versions/")]
        assert ranges[0] == ""
        assert ranges[1].startswith("bytes=")


def random_kills(victim: Victim, kills: int, seed: int) -> None:
    """At so many events of a life (a step is one), and up to a third of a second later."""
    draw = random.Random(seed)
    for _ in range(kills):
        events, wait_s = draw.randrange(STEPS + 6), draw.uniform(0.0, 0.3)
        victim.kill_when(lambda: len(victim.events()) >= events, wait_s)  # noqa: B023  used up within


def test_random_kills(zygote: Zygote, coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    victim = Victim(zygote, coordinator, coordinator.url, tmp_path)
    random_kills(victim, 6, seed=1)
    assert victim.finish()


@pytest.mark.slow
def test_many_random_kills(zygote: Zygote, coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    """Through a slow link, so that transfers are hit as often as training."""
    with Proxy(coordinator.port) as proxy:
        slow = [
            proxy.on(*step, Throttle(60_000), times=10**6) for step in (("GET", "/versions/"), ("PATCH", ""))
        ]
        victim = Victim(zygote, coordinator, proxy.url, tmp_path)
        random_kills(victim, 60, seed=2)
        assert victim.finish()
        assert {"training", "outbox"} <= set(victim.hit)
        assert all(rule.triggered for rule in slow)


# --- two agents, and no room ------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_second_agent_on_a_state_folder_is_refused_and_a_killed_one_leaves_it_free(
    zygote: Zygote, coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    state, log, data = tmp_path / "device", tmp_path / "log", text_of(tmp_path)
    second = device(coordinator.url, coordinator.join_token, state, data)
    told = {"url": coordinator.url, "token": coordinator.join_token, "model": USUAL.model}
    pid = zygote.start(**told, state=state, data=data, log=log)
    wait_until(lambda: any(event["kind"] == "step" for event in events_in(log)))
    for attempt in (second.agent.run, second.agent.prepare):
        with pytest.raises(InputError, match=r"device: another agent trains with this state folder; stop"):
            attempt()
    # A program that only asks shares the folder with the device that trains.
    asker = device(coordinator.url, None, state, None, quantise=False)
    wait_until(lambda: asker.agent.refresh() >= 1)
    assert asker.agent.newest()[0] >= 1
    asker.agent.close()
    kill(pid)
    assert second.agent.run(updates=1) == 1
    second.agent.close()


def test_a_device_whose_disk_is_full_says_so_once_and_goes_on(
    zygote: Zygote, coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    """No file above 8 KB can be written until there is room."""
    log, state, data = tmp_path / "log", tmp_path / "device", text_of(tmp_path)
    with Proxy(coordinator.port) as proxy:
        pid = zygote.start(
            model=USUAL.model,
            url=proxy.url,
            token=coordinator.join_token,
            state=state,
            data=data,
            log=log,
            updates=1,
            file_bytes=8192,
        )

        def told() -> list[str]:
            return [event["text"] for event in events_in(log) if event["kind"] == "disk"]

        # The adapter to train from finds no room first.
        wait_until(lambda: len(proxy.asked("GET", "/versions/")) >= 3 or not lives(pid))
        assert len(told()) == 1, events_in(log)
        assert "cannot be written (File too large); make room on that disk" in told()[0]
        assert lives(pid)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_until(lambda: not lives(pid))
    assert told()[1:] == ["the state folder can be written again"]
    (update,) = updates(coordinator, Journal(state).load().device_id)  # type: ignore[union-attr]
    assert update["steps"] == STEPS
