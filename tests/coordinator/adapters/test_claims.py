"""What a device says of its own update: it weighs no more than the work that it was given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import ProtocolError
from tests.coordinator.adapters.test_door import wait_for
from tests.coordinator.devices import SCALING, configuration, member, random_adapter, update_of
from tests.faults.outside import rows
from tests.processes import CoordinatorProcess

STEPS, BATCH = 20, 8  # of `configuration`, which leaves [training] as it is
CONTENT = codec.encode(random_adapter(4, 1), SCALING)


def test_a_boast_counts_as_the_work_that_was_assigned(tmp_path: Path) -> None:
    """As many examples as the wire has numbers for, beside 16: 20 steps of 8 are 160 at most."""
    policy: dict[str, object] = {"buffer_size": 2, "staleness": "constant"}
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, policy)) as coordinator,
        member(coordinator, "boaster") as boaster,
        member(coordinator, "honest") as honest,
    ):
        for device, examples in ((boaster, 2**31 - 1), (honest, 16)):
            work = device.work()
            device.send(work, CONTENT)
            device.transport.deliver(work.id, update_of(CONTENT, 4, examples))
        wait_for(honest, 1)
        found = rows(
            coordinator.data,
            "SELECT d.name, u.weight, u.record FROM updates u JOIN devices d ON d.id = u.device",
        )
        weights = {name: weight for name, weight, _ in found}
        assert weights == pytest.approx({"boaster": 160 / 176, "honest": 16 / 176})
        kept = {name: json.loads(record)["examples"] for name, _, record in found}
        assert kept == {"boaster": STEPS * BATCH, "honest": 16}


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"steps": STEPS + 1}, f"Update.steps must be 1 to {STEPS}, as many as were assigned"),
        ({"steps": 10**400}, "Update.steps: must be 0 to 2147483647, got a number of 401 digits"),
        ({"examples": 10**18}, "Update.examples: must be 0 to 2147483647"),
        ({"steps": 0}, "Update.steps must be 1 to"),
        ({"examples": 0}, "must be 1 or more"),
        ({"size_bytes": -5}, "Update.size_bytes: must be 0 to .*, got -5"),
    ],
)
def test_a_claim_that_cannot_be_true_is_refused(tmp_path: Path, claim: dict[str, int], said: str) -> None:
    with (
        CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 1})) as coordinator,
        member(coordinator) as device,
    ):
        work = device.work()
        device.send(work, CONTENT)
        with pytest.raises(ProtocolError, match=said):
            device.transport.deliver(work.id, replace(update_of(CONTENT, 4), **claim))  # type: ignore[arg-type]
        device.transport.deliver(work.id, update_of(CONTENT, 4))  # and the same work, told as it is, counts
        wait_for(device, 1)
