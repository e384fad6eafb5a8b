"""What a start requires of a data folder: nobody else at it, and nothing lost. Otherwise one line."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.storage.failpoints import VARIABLE
from coordinator.storage.store import Store
from edge_sdk.core.errors import OurFault
from tests.coordinator.devices import configuration, member
from tests.faults.conftest import Run
from tests.faults.outside import blob, rows
from tests.faults.test_backup import waited_for
from tests.processes import MOST_BYTES, CoordinatorProcess, command


def refused(run: Run, data: Path, config: Path) -> str:
    done = run("serve", "--data", data, "--config", config, "--port", 0)
    assert done.returncode == 2
    assert "listening" not in done.stdout
    assert done.stderr.startswith(f"edge-coordinator: {data}")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_one_coordinator_on_one_folder_and_a_kill_leaves_no_lock(run: Run, tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path)) as coordinator:
        again = coordinator.data.parent / "." / coordinator.data.name
        assert "a coordinator is running on this folder; stop that one" in refused(
            run, again, coordinator.config
        )
        assert coordinator.is_running()
        with member(coordinator) as device:
            device.work()
        coordinator.kill()
        coordinator.start()
        assert coordinator.stop() == 0
        coordinator.start()


def test_the_time_of_a_lease_may_change_between_starts(tmp_path: Path) -> None:
    with CoordinatorProcess(
        tmp_path, configuration(tmp_path, {"lease_s": 600.0, "first_lease_s": 900.0})
    ) as coordinator:
        assert coordinator.stop() == 0
        coordinator.config.write_text(configuration(tmp_path, {"lease_s": 900.0, "first_lease_s": 900.0}))
        coordinator.start()
        with member(coordinator) as device:
            assert device.transport.federation().lease_s == 900.0
            assert 600.0 < device.work().expires_in_s <= 900.0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorProcess:
    """Three versions, stopped."""
    folder = tmp_path_factory.mktemp("original")
    with CoordinatorProcess(folder, configuration(folder, {"buffer_size": 1})) as coordinator:
        with member(coordinator) as device:
            for number in (1, 2, 3):
                device.hand_in(device.work(), seed=number)
                waited_for(coordinator, number)
        assert coordinator.stop() == 0
    return coordinator


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("version", "spoil", "reason"),
    [
        (3, Path.unlink, "is gone"),
        (3, flip, "is damaged (its bytes have another SHA-256)"),
        (3, cut, "is damaged ("),
        (1, Path.unlink, "is gone"),
        (1, cut, "is damaged ("),
    ],
)
def test_a_version_that_is_not_what_it_was_is_told_at_the_start(
    run: Run,
    original: CoordinatorProcess,
    tmp_path: Path,
    version: int,
    spoil: Callable[[Path], None],
    reason: str,
) -> None:
    data = tmp_path / "data"
    shutil.copytree(original.data, data)
    ((digest,),) = rows(data, f"SELECT digest FROM versions WHERE version = {version}")
    spoil(blob(data, digest))
    said = refused(run, data, original.config)
    assert f"the file of version {version}, blobs/{digest[:2]}/{digest}, {reason}" in said
    assert "restore the folder from a backup" in said


@pytest.mark.parametrize("spoil", [Path.unlink, flip, cut])
def test_an_export_of_a_damaged_version_is_refused(
    run: Run, original: CoordinatorProcess, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(original.data, data)
    ((digest,),) = rows(data, "SELECT digest FROM versions WHERE version = 2")
    spoil(blob(data, digest))
    done = run("export", "--version", 2, "--data", data, "--out", out)
    assert done.returncode == 2
    assert f"the file of version 2, blobs/{digest[:2]}/{digest}, is damaged or gone" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert run("export", "--version", 3, "--data", data, "--out", out).returncode == 0


def test_a_version_that_is_damaged_while_it_runs_is_served_to_nobody(
    original: CoordinatorProcess, tmp_path: Path
) -> None:
    coordinator = CoordinatorProcess(tmp_path, original.config.read_text())
    shutil.copytree(original.data, coordinator.data)
    with coordinator, member(coordinator) as device:
        ((digest,),) = rows(coordinator.data, "SELECT digest FROM versions WHERE version = 3")
        damaged = blob(coordinator.data, digest)
        whole = damaged.read_bytes()
        flip(damaged)
        with pytest.raises(OurFault, match="version 3 is not what was published"):
            device.transport.download(3, 4, tmp_path / "adapter", None, "int8", most_bytes=MOST_BYTES)
        device.transport.download(2, 4, tmp_path / "adapter", None, "int8", most_bytes=MOST_BYTES)
        damaged.write_bytes(whole)  # restored from a backup, while it runs
        device.transport.download(3, 4, tmp_path / "adapter", None, "int8", most_bytes=MOST_BYTES)


def test_a_damaged_database_is_told_at_the_start(
    run: Run, original: CoordinatorProcess, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(original.data, data)
    path = data / "coordinator.sqlite"
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)  # the second page
    path.write_bytes(content)
    assert "database" in refused(run, data, original.config)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(path).execute("SELECT * FROM meta, devices, updates").fetchall()


def other_federation(path: Path) -> None:
    """A database with all tables, and no federation in it."""
    Store(path).close()


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b""), other_federation])
@pytest.mark.parametrize(
    ("left", "named"),
    [
        (["blobs"], "blobs/"),
        (["join-token"], "join-token"),
        (["coordinator.sqlite.schema-5.bak"], "coordinator.sqlite.schema-5.bak"),
        (["blobs", "join-token", "uploads", "cache"], "blobs/"),
    ],
)
def test_a_folder_that_held_a_federation_is_never_begun_anew(
    run: Run,
    original: CoordinatorProcess,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    left: list[str],
    named: str,
) -> None:
    """A new federation would collect every blob of the old one."""
    data, database = tmp_path / "data", tmp_path / "data" / "coordinator.sqlite"
    shutil.copytree(original.data, data)
    shutil.copyfile(database, data / "coordinator.sqlite.schema-5.bak")
    for path in data.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    if spoil is not Path.unlink:
        spoil(database)
    for _ in range(2):  # the first try leaves nothing that a second one takes for a federation
        said = refused(run, data, original.config)
        assert f"held a federation ({named}" in said
        assert "restore the folder from a backup" in said
    assert {path: path.read_bytes() for path in before} == before


def test_a_start_that_was_killed_before_it_began_begins_again(tmp_path: Path) -> None:
    data, config = tmp_path / "data", tmp_path / "coordinator.toml"
    config.write_text(configuration(tmp_path))
    for point in (
        "migration-written",
        "migration-committed",
        "meta-written",
        "meta-committed",
        "token-written",
    ):
        serve = ("serve", "--data", data, "--config", config, "--port", 0)
        done = command("coordinator.cli", *serve, environ={VARIABLE: f"{point}=kill"})
        assert "held a federation" not in done.stderr
    with CoordinatorProcess(tmp_path, config.read_text()) as coordinator, member(coordinator) as device:
        assert device.work().version == 0


def test_an_export_of_what_was_collected_says_which_there_are(run: Run, tmp_path: Path) -> None:
    policy = {"buffer_size": 1, "max_staleness": 1, "lease_s": 1.0, "timeout_s": 1.0}
    config = configuration(tmp_path, policy) + "[storage]\nkeep_versions = 1\n"
    with CoordinatorProcess(tmp_path, config) as coordinator:
        with member(coordinator) as device:
            for number in range(1, 6):
                device.hand_in(device.work(), seed=number)
                waited_for(coordinator, number)
        assert coordinator.stop() == 0
    out = ("--out", tmp_path / "out", "--data", coordinator.data)
    done = run("export", "--version", 1, *out)
    assert done.returncode == 2
    assert done.stderr == "edge-coordinator: --version 1 was collected; there are 5, 4, 3\n"
    assert run("export", "--version", 3, *out).returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
