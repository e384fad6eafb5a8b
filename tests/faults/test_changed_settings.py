"""Every setting that the host may change between starts: a folder starts with another value, and heeds it."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from coordinator.engine.policy import Policy
from coordinator.merging.admission import Admission
from coordinator.privacy.mechanism import Privacy
from coordinator.service.coordinator import Coordinator
from coordinator.settings import Settings, Storage, load_settings
from edge_sdk.connection.transport import Transport
from tests.coordinator.devices import LADDER, SCALING, Device, configuration, member
from tests.faults.outside import Seen, rows
from tests.faults.test_backup import waited_for
from tests.processes import CoordinatorProcess, toml

Values = Mapping[str, object]
TABLES: dict[str, Any] = {
    "policy": Policy,
    "admission": Admission,
    "storage": Storage,
    "privacy": Privacy,
}
# Of each table each key with another value than the folder began with; what that needs beside it.
OTHER: dict[str, dict[str, Any]] = {
    "policy": {
        "mode": "synchronous",
        "buffer_size": 2,
        "quorum": 2,
        "timeout_s": 90.0,
        "least_version_s": 3.0,
        "over_selection": 0.5,
        "concurrency": 3,
        "max_staleness": 20,
        "staleness": "hinge",
        "server_learning_rate": 0.5,
        "lease_s": 300.0,
        "first_lease_s": 30.0,
        "deadline_mads": 4.0,
        "work_s": 100.0,
        "retry_s": 1.0,
        "max_examples": 500,
    },
    "admission": {
        "over_norm": "refuse",
        "norm_factor": 3.0,
        "history": 50,
        "history_least": 6,
        "daily_factor": 4.0,
        "reach_factor": 3.0,
        "robust": "trimmed",
        "trimmed_share": 0.3,
    },
    "storage": {"keep_versions": 2},
    "privacy": {"noise_multiplier": 2.0, "clip_norm": 3.0, "delta": 1e-6, "max_epsilon": 9.0},
}
BESIDE: dict[str, dict[str, Values]] = {"over_selection": {"policy": {"mode": "synchronous"}}}
PRIVATE = {"noise_multiplier": 1.0, "clip_norm": 5.0}


def settings_of(folder: Path, tables: Mapping[str, Values]) -> Settings:
    """The configuration of devices of numpy with these tables besides."""
    configuration(folder)  # writes the record of the base
    federation: Values = {"ladder": LADDER, "rank_cap": 12, "scaling": SCALING, "rule": "carry"}
    path = folder / "coordinator.toml"
    path.write_text(toml({"federation": federation, **tables}, folder / "base.json"))
    return load_settings(path)


def started(data: Path, settings: Settings) -> Coordinator:
    """A coordinator that was started on the folder and closed again."""

    async def start() -> Coordinator:
        coordinator = Coordinator(data, settings)
        await coordinator.close()
        return coordinator

    return asyncio.run(start())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with an update that waits, and work that a device has in its hands."""
    folder = tmp_path_factory.mktemp("original")
    with CoordinatorProcess(folder, configuration(folder, {"buffer_size": 4})) as coordinator:
        with member(coordinator, "one") as one, member(coordinator, "two") as two:
            one.hand_in(one.work())
            two.work()
        assert coordinator.stop() == 0
    return coordinator.data


def test_every_key_has_another_value_here() -> None:
    """A new key gets one as well."""
    for table, kind in TABLES.items():
        assert set(OTHER[table]) == {field.name for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(kind):
            assert OTHER[table][field.name] != field.default


@pytest.mark.parametrize(
    ("table", "key"), [(table, key) for table in OTHER if table != "privacy" for key in OTHER[table]]
)
def test_a_folder_starts_with_another_value(original: Path, tmp_path: Path, table: str, key: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(original, data)
    beside = BESIDE.get(key, {}).get(table, {})
    settings = settings_of(tmp_path, {table: {**beside, key: OTHER[table][key]}})
    assert getattr(getattr(settings, table), key) == OTHER[table][key]
    coordinator = started(data, settings)
    assert coordinator.engine.policy == settings.policy
    assert [update.device for update in coordinator.engine.state.buffer] == [
        device for (device,) in rows(data, "SELECT device FROM updates WHERE rejected IS NULL")
    ]
    assert rows(data, "SELECT COUNT(*) FROM runs") == [(2,)]
    ((stored,),) = rows(data, "SELECT value FROM meta WHERE key = 'federation'")
    assert coordinator.federation.id in stored


@pytest.mark.parametrize("key", OTHER["privacy"])
def test_a_private_folder_starts_with_another_value(tmp_path: Path, key: str) -> None:
    pytest.importorskip("dp_accounting")
    started(tmp_path / "data", settings_of(tmp_path, {"privacy": PRIVATE}))
    changed = settings_of(tmp_path, {"privacy": {**PRIVATE, key: OTHER["privacy"][key]}})
    assert started(tmp_path / "data", changed).privacy == changed.privacy != Privacy(**PRIVATE)


def test_a_coordinator_goes_on_with_all_values_changed(original: Path, tmp_path: Path) -> None:
    """The update that waited counts, a device that joined before works on; and so when they are put back."""
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path))
    shutil.copytree(original, coordinator.data)
    before = coordinator.config.read_text()
    policy = {key: value for key, value in OTHER["policy"].items() if key not in ("mode", "over_selection")}
    admission = OTHER["admission"] | {"reach_factor": 1e9}
    tables = {
        "policy": policy | {"least_version_s": 0.0},
        "admission": admission,
        "storage": OTHER["storage"],
    }
    settings_of(tmp_path, tables)
    with coordinator:
        with member(coordinator) as device:
            assert device.transport.federation().lease_s == 300.0
            assert device.status().buffer_size == 2
            assert device.status().buffered == 1
            device.hand_in(device.work(), seed=2)
            again = Device(
                Transport(coordinator.url, device.credential), device.id, device.credential, device.host
            )
            waited_for(coordinator, 1)
            assert coordinator.stop() == 0
            coordinator.config.write_text(before)
            coordinator.start()
            again.hand_in(again.work(), seed=3)
            assert again.status().version == 1
            again.transport.close()
        assert coordinator.stop() == 0
    Seen().check(coordinator.data, [])
