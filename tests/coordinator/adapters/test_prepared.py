"""A version's files are made and read before it is published: what cannot be served is nobody's start."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from coordinator.rules.carry import Carry
from coordinator.rules.rule import Merging, NewFactors
from edge_sdk.core.lora import LoraFactors
from tests.coordinator.devices import configuration, member
from tests.faults.outside import rows
from tests.processes import PATIENCE_S, CoordinatorProcess

ROOT = Path(__file__).parents[3]


class Huge(Carry):
    """A rule from elsewhere with a fault: products of 10¹², which float16 cannot hold however it is split."""

    def merge(self, merging: Merging, rank: int) -> NewFactors:
        """Far too much."""
        found = super().merge(merging, rank)
        scale = np.float32(1e12) / np.float32(max(1e-6, np.linalg.norm(found.factors.b)))
        return NewFactors(LoraFactors(found.factors.b * scale, found.factors.a), found.rank, 1e24)


def float16(config: str) -> str:
    return config.replace("[federation]\n", '[federation]\ndownload_dtype = "float16"\n')


def test_a_version_that_could_not_be_served_is_not_published(tmp_path: Path) -> None:
    """It was, and answered 500 to everybody for ever."""
    config = float16(configuration(tmp_path, {"buffer_size": 1}, rule=f"{__name__}:Huge"))
    coordinator = CoordinatorProcess(tmp_path, config)
    coordinator.environment["PYTHONPATH"] = str(ROOT)
    with coordinator, member(coordinator) as device:
        device.hand_in(device.work())
        deadline = time.monotonic() + PATIENCE_S
        while "version 1 could not be served" not in coordinator.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert device.status().version == 0
        with member(coordinator, "another") as another:  # who comes now is given work all the same
            assert another.work().version == 0
        assert coordinator.stop() == 0
    assert "Traceback" not in coordinator.log.read_text()
    assert rows(coordinator.data, "SELECT COUNT(*) FROM versions") == [(0,)]
    assert rows(coordinator.data, "SELECT COUNT(*) FROM updates WHERE rejected IS NULL") == [(1,)]


def test_what_devices_ask_for_is_there_when_the_version_is(tmp_path: Path) -> None:
    config = float16(configuration(tmp_path, {"buffer_size": 1}))
    with CoordinatorProcess(tmp_path, config) as coordinator, member(coordinator) as device:
        device.hand_in(device.work())
        deadline = time.monotonic() + PATIENCE_S
        while device.status().version < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Who holds the global adapter frozen asks for all of its live rank.
        found = [path.name for path in (coordinator.data / "cache").glob("*.safetensors")]
        assert [name.split("-", 1)[1] for name in found] == ["1-4-float16.safetensors"]
