"""Real agents for tests of faults: tiny bases, a state folder each, and what the coordinator has of them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_sdk.agent import Agent
from edge_sdk.connection import transport
from edge_sdk.core.messages import Base
from edge_sdk.options import Event, Limits, Options
from edge_sdk.participation.collaborators import Collaborators
from edge_sdk.system import backoff
from edge_sdk.worker.messages import Setup
from edge_sdk.worker.worker import Worker
from tests.processes import PATIENCE_S, CoordinatorProcess
from tests.test_federation import configuration, write_data


class Clock:
    """Tells the time, and can be put forward: what was looked up a moment ago is not fresh any more then."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_s

    def forward(self, seconds: float = 60.0) -> None:
        self._ahead_s += seconds


def federation_config(
    folder: Path, base: Base, steps: int = 3, checkpoint_s: float = 3600.0, **policy: Any
) -> str:
    """Every assignment begins with a download, every step with a heartbeat, every update makes a version."""
    USUAL.model = base.model
    training: dict[str, object] = {"steps": steps, "checkpoint_s": checkpoint_s}
    return configuration(folder, base, "flexlora", training, {"buffer_size": 1} | policy, "float32")


@dataclass
class Usual:
    """What the agents of `device` work with where a test names nothing else; `quick` changes it."""

    collaborators: Collaborators = field(default_factory=Collaborators)
    model: str | None = None  # of the last `federation_config`: a folder is for a device's owner to name


USUAL = Usual()


class Resident(Worker):
    """A worker that outlives its agent, as one base is enough for a module of tests."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def quick() -> Any:
    """Short time-outs and pauses, so that a fault costs a test little; and one base in memory for all."""
    workers: dict[Setup, Worker] = {}

    def worker_for(federation: Any, options: Options, data: Path | None, decision: Any) -> Worker:
        key = str(data)
        if key not in workers:
            setup = Setup(
                federation.base.model,
                federation.base.modules,
                federation.scaling,
                federation.upload_dtype,
                data=str(data),
                device="cpu",
                quantise=False,
                alone=False,
            )
            workers[key] = Resident(setup)
        return workers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "TIMEOUT", httpx.Timeout(3.0))
        patch.setattr(transport, "BEAT_TIMEOUT", httpx.Timeout(1.0))
        patch.setattr(backoff, "FIRST_S", 0.05)
        patch.setattr(backoff, "MOST_S", 0.5)
        patch.setattr(USUAL, "collaborators", Collaborators(make_worker=worker_for))
        yield workers


@dataclass
class Device:
    """An agent in a folder of its own, and what it said."""

    agent: Agent
    clock: Clock
    events: list[Event] = field(default_factory=list)

    def texts(self, *kinds: str) -> list[str]:
        return [event.text for event in self.events if event.kind in kinds]

    @property
    def id(self) -> str:
        session = self.agent.journal.load()
        assert session is not None
        return session.device_id


def device(
    url: str,
    token: str | None,
    folder: Path,
    data: Path | None,
    on_event: Callable[[Event], None] = lambda event: None,
    collaborators: Collaborators | None = None,
    **options: Any,
) -> Device:
    """A device that is new, or the one that this folder remembers."""
    events: list[Event] = []
    clock = Clock()

    def listen(event: Event) -> None:
        events.append(event)
        on_event(event)

    chosen: dict[str, Any] = {"device": "cpu", "memory_budget_bytes": 10**9, "isolate": False, "nice": 0}
    chosen |= {"quantise": False, "model": USUAL.model, "limits": Limits(least_examples=1)}
    agent = Agent(
        url,
        data=data,
        join_token=token,
        options=Options(name=folder.name, state_dir=folder, **(chosen | options)),
        on_event=listen,
        collaborators=replace(collaborators or USUAL.collaborators, clock=clock),
    )
    return Device(agent, clock, events)


def text_of(folder: Path) -> Path:
    return write_data(folder / "data.jsonl", "red")


def updates(coordinator: CoordinatorProcess, device_id: str) -> list[dict[str, Any]]:
    """The updates of a device that the coordinator acknowledged, in order; each is there once."""
    path = coordinator.data / "coordinator.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute(
            "SELECT assignment, record, merged_version FROM updates WHERE device = ? ORDER BY received_at",
            (device_id,),
        ).fetchall()
    assert len({row[0] for row in rows}) == len(rows)
    return [json.loads(record) | {"assignment": id, "merged_version": v} for id, record, v in rows]


def wait_until(condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
