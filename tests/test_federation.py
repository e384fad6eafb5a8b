"""Whole rounds with real parts: a coordinator process, HTTP, agents, and 4-bit base models."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from coordinator.cli import main as host
from coordinator.rules.columns import drawn_columns
from edge_sdk.agent import Agent
from edge_sdk.connection.transport import Transport
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.choice import memory
from edge_sdk.core.choice.model_facts import facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.messages import CARRYING, Base, Update, UpdateReply
from edge_sdk.core.records import to_json
from edge_sdk.model import base_model, files
from edge_sdk.options import Event, Limits, Options
from edge_sdk.training.adapter_places import CARRIED, AdapterPlaces
from tests.models import Architecture, build_model
from tests.processes import PATIENCE_S, CoordinatorProcess, environment, toml

LADDER = (2, 8)
CAP = 12
RANKS: dict[str, tuple[int, int]] = {"fedit": (8, 8)}  # which averages factors of one rank
BATCH, SEQUENCE_LEN = 2, 48
IDS = torch.tensor([[1, 30, 40, 50, 60, 70, 80, 2]])

# PEFT reads an attribute that transformers has renamed, and finds GPT-2's Conv1D by itself and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


def configuration(
    folder: Path,
    base: Base,
    rule: str,
    training: dict[str, object],
    policy: dict[str, object],
    wire: WireDtype = "int8",
) -> str:
    record = folder / "base.json"
    record.write_text(json.dumps(to_json(base)))
    federation: dict[str, object] = {
        "rule": rule,
        "ladder": sorted(set(RANKS.get(rule, LADDER))),
        "rank_cap": cap_of(rule, base),
        "heartbeat_s": 0.001,  # with every step, however quick the machine
        "download_dtype": wire,
        "upload_dtype": wire,
    }
    sections: dict[str, dict[str, object]] = {
        "federation": federation,
        "training": {"batch": BATCH, "sequence_len": SEQUENCE_LEN, "learning_rate": 0.01} | training,
        "policy": {"retry_s": 0.05} | policy,
    }
    return toml(sections, record)


def cap_of(rule: str, base: Base) -> int:
    """FLoRA truncates nothing."""
    return max(min(shape) for shape in base.modules.values()) if rule == "flora" else CAP


def write_data(path: Path, colour: str) -> Path:
    records = [
        {
            "prompt": f"turn the {colour} light {state}",
            "completion": f'{{"light": "{colour}", "state": "{state}"}}',
        }
        for state in ("on", "off", "dim")
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def budget_for(rank: int, base: Base, rule: str) -> int:
    """Memory in which this rank fits and the next larger one does not."""
    facts = facts_from_config(files.read_config(Path(base.model)), base.modules)
    carried, dtype = (cap_of(rule, base), "int8") if rule in CARRYING else (0, "float32")
    way = Setting(Ranks.uniform(rank), carried, SEQUENCE_LEN, BATCH, carried_dtype=dtype)
    return memory.estimate(facts, way, base_model.placement("cpu", True)).peak_bytes


def wait_for_version(agent: Agent, version: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while agent.transport.newest().version < version:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def in_float32(directory: Path) -> base_model.LoadedBase:
    """The 4-bit base, computing in float32: PEFT multiplies factors so, and in bfloat16 we do not."""
    return base_model.load(str(directory), device="cpu", dtype="float32")


def exported_logits(directory: Path, adapter: Path) -> torch.Tensor:
    """What PEFT computes with an exported adapter on the 4-bit base."""
    return logits(PeftModel.from_pretrained(in_float32(directory).model, adapter))


@pytest.mark.parametrize(
    ("architecture", "rule", "wire"),
    [
        ("llama", "carry", "float32"),
        ("llama", "flexlora", "float32"),
        ("gpt2", "carry", "float32"),
        ("qwen", "flexlora", "float16"),
        ("llama", "innovation", "float32"),
        ("qwen", "fedit", "float32"),
        ("gpt2", "hetlora", "int8"),
        ("llama", "flora", "int8"),
    ],
)
def test_a_round_from_training_to_loading(
    tmp_path: Path, architecture: Architecture, rule: str, wire: WireDtype
) -> None:
    directory = build_model(tmp_path / "base", architecture)
    base = base_model.describe(str(directory))
    config = configuration(tmp_path, base, rule, {"steps": 3}, {"buffer_size": 2}, wire)
    with CoordinatorProcess(tmp_path, config) as coordinator, contextlib.ExitStack() as ending:
        agents = []
        ranks = RANKS.get(rule, LADDER)
        for rank, colour in zip(ranks, ("red", "blue"), strict=True):
            options = Options(
                name=colour,
                state_dir=tmp_path / colour,
                model=base.model,
                limits=Limits(least_examples=1),
                device="cpu",
                memory_budget_bytes=budget_for(rank, base, rule),
                budget_covers_libraries=False,
                isolate=False,
            )
            data = write_data(tmp_path / f"{colour}.jsonl", colour)
            agent = Agent(coordinator.url, data=data, join_token=coordinator.join_token, options=options)
            agents.append(agent)
            assert agent.run(updates=1) == 1
            ending.callback(agent.transport.close)
            assert agent.choice.rank == rank
        wait_for_version(agents[0], 1)
        for agent in agents:  # and once more, now from a version that holds something
            assert agent.run(updates=1) == 1
        wait_for_version(agents[0], 2)
        assert {device.rank for device in coordinator.status().devices} == set(ranks)

        version, adapter = agents[1].newest()
        assert version == 2
        assert adapter is not None
        out = tmp_path / "adapter"
        assert host(["export", "--data", str(coordinator.data), "--out", str(out)]) == 0

    plain = logits(in_float32(directory).model)
    loaded = exported_logits(directory, out)
    frozen = in_float32(directory)
    places = AdapterPlaces(frozen, base.modules, 2.0)
    with places.installed({CARRIED: adapter}):
        ours = logits(frozen.model)
    assert (loaded - plain).abs().max() > 1e-2
    # What is exported is exact; a device has what came over the wire.
    rounding = {"float32": 0.0, "float16": 1e-3, "int8": 0.04}[wire] * float((loaded - plain).abs().max())
    np.testing.assert_allclose(loaded.numpy(), ours.numpy(), atol=1e-5 * float(plain.abs().max()) + rounding)


# --- a device that dies ---------------------------------------------------------------------------


def checkpointed_step(path: Path) -> int:
    """The step that a checkpoint holds; 0 without one."""
    if not path.exists():
        return 0
    with safe_open(path, framework="numpy") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


def test_a_killed_device_goes_on_from_its_checkpoint_and_delivers_once(tmp_path: Path) -> None:
    directory = build_model(tmp_path / "base", "llama")
    base = base_model.describe(str(directory))
    steps = 40
    training: dict[str, object] = {"steps": steps, "checkpoint_s": 0.05}
    config = configuration(tmp_path, base, "carry", training, {"buffer_size": 1})
    data, state = write_data(tmp_path / "data.jsonl", "red"), tmp_path / "state"
    with CoordinatorProcess(tmp_path, config) as coordinator:
        arguments = [
            "join",
            coordinator.url,
            "--data",
            str(data),
            "--state",
            str(state),
            "--device",
            "cpu",
            "--model",
            base.model,
        ]
        arguments += ["--least-examples", "1"]
        arguments += ["--token", coordinator.join_token, "--memory-budget", "1GB", "--duty", "0.1"]
        with (tmp_path / "device.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "edge_sdk.cli", *arguments],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            deadline = time.monotonic() + 3 * PATIENCE_S  # a device first tries 4 bits, and its speed
            try:
                while checkpointed_step(state / "checkpoint.safetensors") < 3:
                    assert process.poll() is None, (tmp_path / "device.log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait()
        reached = checkpointed_step(state / "checkpoint.safetensors")
        assert 3 <= reached < steps

        events: list[Event] = []
        agent = Agent(
            coordinator.url,
            data=data,
            options=Options(
                state_dir=state,
                model=base.model,
                limits=Limits(least_examples=1),
                device="cpu",
                memory_budget_bytes=10**9,
                isolate=False,
            ),
            on_event=events.append,
        )
        assert agent.run(updates=1) == 1
        taken = [event.step for event in events if event.kind == "step"]
        assert taken == list(range(reached + 1, steps + 1))
        wait_for_version(agent, 1)
        agent.transport.close()
        assert not (state / "outbox.safetensors").exists()
        assert not (state / "checkpoint.safetensors").exists()
        with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
            (row,) = database.execute("SELECT record, merged_version FROM updates").fetchall()
        assert (json.loads(row[0])["steps"], row[1]) == (steps, 1)


def test_a_device_goes_on_while_the_coordinator_is_away(tmp_path: Path) -> None:
    directory = build_model(tmp_path / "base", "llama")
    base = base_model.describe(str(directory))
    config = configuration(tmp_path, base, "flexlora", {"steps": 3}, {"buffer_size": 1})
    data = write_data(tmp_path / "data.jsonl", "red")
    with CoordinatorProcess(tmp_path, config) as coordinator:
        offline: list[str] = []

        def on_event(event: Event) -> None:
            if event.kind == "step" and event.step == 1 and not offline:
                coordinator.kill()
            if event.kind == "offline":
                offline.append(event.text)
                if len(offline) == 3:  # the first a heartbeat, the rest attempts to deliver
                    coordinator.start()

        options = Options(
            state_dir=tmp_path / "state",
            model=base.model,
            limits=Limits(least_examples=1),
            device="cpu",
            memory_budget_bytes=10**9,
            isolate=False,
        )
        agent = Agent(
            coordinator.url,
            data=data,
            join_token=coordinator.join_token,
            options=options,
            on_event=on_event,
        )
        assert agent.run(updates=1) == 1
        assert any("training goes on without the coordinator" in text for text in offline)
        assert any("trying again in" in text for text in offline)
        wait_for_version(agent, 1)
        agent.transport.close()


def test_a_refused_update_is_no_delivered_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model.describe(str(build_model(tmp_path / "base", "llama")))
    config = configuration(tmp_path, base, "carry", {"steps": 2}, {"buffer_size": 1})
    with CoordinatorProcess(tmp_path, config) as coordinator:
        events: list[Event] = []
        agent = Agent(
            coordinator.url,
            data=write_data(tmp_path / "data.jsonl", "red"),
            join_token=coordinator.join_token,
            options=Options(
                state_dir=tmp_path / "state",
                model=base.model,
                limits=Limits(least_examples=1),
                device="cpu",
                memory_budget_bytes=10**9,
                isolate=False,
            ),
            on_event=events.append,
        )
        deliver, boasting = Transport.deliver, [True]

        def deliver_boasting(transport: Transport, work: str, update: Update) -> UpdateReply:
            if boasting:
                boasting.clear()
                update = replace(update, rank=update.rank + 100)
            return deliver(transport, work, update)

        monkeypatch.setattr(Transport, "deliver", deliver_boasting)
        try:
            assert agent.run(updates=1) == 1
        finally:
            agent.close()
    assert [event.kind for event in events if event.kind in ("refused", "delivered")] == [
        "refused",
        "delivered",
    ]
    assert "Update.rank: 1" in next(event.text for event in events if event.kind == "refused")


def test_a_sparse_warm_up_trains_the_drawn_columns_and_then_all(tmp_path: Path) -> None:
    base = base_model.describe(str(build_model(tmp_path / "base", "llama")))
    training: dict[str, object] = {"steps": 3, "sparse_versions": 2}
    config = configuration(tmp_path, base, "flexlora", training, {"buffer_size": 1})
    with CoordinatorProcess(tmp_path, config) as coordinator:
        agent = Agent(
            coordinator.url,
            data=write_data(tmp_path / "data.jsonl", "red"),
            join_token=coordinator.join_token,
            options=Options(
                state_dir=tmp_path / "state",
                model=base.model,
                limits=Limits(least_examples=1),
                device="cpu",
                memory_budget_bytes=10**9,
                isolate=False,
            ),
        )
        rank = LADDER[-1]
        for version in (1, 2, 3):
            assert agent.run(updates=1) == 1
            wait_for_version(agent, version)
        federation = agent.transport.federation()
        agent.close()
        with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as database:
            digests = [d for (d,) in database.execute("SELECT digest FROM versions ORDER BY version")]
        versions = [
            dict(codec.open_own(coordinator.data / "blobs" / d[:2] / d, federation.scaling).modules())
            for d in digests
        ]
    for name, (_, width) in base.modules.items():
        drawn = drawn_columns(width, rank, f"{federation.id}/{name}")
        others = np.setdiff1d(np.arange(width), drawn)
        first, second, third = (np.abs(version[name].product()) for version in versions)
        size = first.max()
        assert size > 0
        assert max(first[:, others].max(), second[:, others].max()) <= 1e-5 * max(size, second.max())
        assert np.abs(second - first).max() > 1e-3 * size  # and it went on there
        assert third[:, others].max() > 1e-3 * size
