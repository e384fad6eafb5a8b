"""An agent whose training runs out of memory, by a limit that the kernel enforces: it lives and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edge_sdk.agent import Agent
from edge_sdk.core.messages import Base
from edge_sdk.model import base_model
from edge_sdk.options import Event, Limits, Options
from tests import memory_limits
from tests.models import build_larger_llama
from tests.processes import PATIENCE_S, CoordinatorProcess, workers
from tests.test_federation import configuration, wait_for_version

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")

LIMIT_BYTES = 64 << 20  # eight rows of 512 tokens at once need more, on top of a loaded base
STEPS = 4
TRAINING: dict[str, object] = {"steps": STEPS, "batch": 8, "sequence_len": 512, "checkpoint_s": 0.001}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return base_model.describe(str(build_larger_llama(tmp_path / "base")))


@pytest.fixture
def coordinator(tmp_path: Path, base: Base) -> CoordinatorProcess:
    policy: dict[str, object] = {"buffer_size": 1}
    return CoordinatorProcess(tmp_path, configuration(tmp_path, base, "flexlora", TRAINING, policy))


def test_the_work_in_hand_goes_on_in_a_smaller_way(
    coordinator: CoordinatorProcess, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker maps what a step needs and returns it: otherwise the heap of the first step would do for all.
    tunables = "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    rows = [{"prompt": f"{n} is", "completion": " ".join(["red"] * 600)} for n in range(24)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events: list[Event] = []
    with coordinator, memory_limits.cgroup(LIMIT_BYTES) as group:

        def squeeze(event: Event) -> None:
            events.append(event)
            if event.kind == "step" and group.kills() == 0:
                for pid in workers():
                    group.take_in(pid)

        agent = Agent(
            coordinator.url,
            data=data,
            join_token=coordinator.join_token,
            options=Options(
                name="narrow",
                model=base.model,
                limits=Limits(least_examples=1),
                state_dir=tmp_path / "state",
                device="cpu",
                quantise=False,
                memory_budget_bytes=2 * 10**9,
                nice=0,
            ),
            on_event=squeeze,
        )
        assert agent.run(updates=1) == 1
        wait_for_version(agent, 1)
        device = coordinator.status().devices[0]
        assert agent.stop(PATIENCE_S).done
        agent.close()
    (told,) = [event.text for event in events if event.kind == "memory"]
    assert "killed by the system" in told
    assert "it goes on with rank" in told
    steps = [event.step for event in events if event.kind == "step"]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))  # none was lost, and it went on from the last
    assert device.updates == 1
    (correction,) = json.loads((tmp_path / "state" / "memory.json").read_text())["corrections"].values()
    assert (correction["failures"], correction["successes"]) == (1, 1)
    # What was learnt is remembered: the next assignment is asked for in a way that fits.
    chosen = agent.choice.setting
    assert chosen.micro_batch < 8 or chosen.ranks.largest < 4
