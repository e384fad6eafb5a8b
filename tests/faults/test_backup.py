"""A backup of a running coordinator: whole, restorable, with all that was acknowledged before it, once."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from coordinator.storage.blobs import Blobs
from coordinator.storage.failpoints import VARIABLE, Point
from coordinator.storage.store import Store
from coordinator.upkeep import backup
from coordinator.upkeep.collection import Collector
from edge_sdk.connection.transport import Transport
from edge_sdk.core.errors import InputError
from tests.coordinator.devices import Device, configuration, member
from tests.faults.conftest import Run
from tests.faults.crowd import Crowd
from tests.faults.outside import Seen, blob, rows, temporaries
from tests.faults.test_kills import BACKING_UP, busy
from tests.processes import PATIENCE_S, CoordinatorProcess, command

DATABASE = "coordinator.sqlite"


def waited_for(coordinator: CoordinatorProcess, version: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while rows(coordinator.data, "SELECT COALESCE(MAX(version), 0) FROM versions") < [(version,)]:
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        time.sleep(0.05)


def test_backups_while_uploads_go_on_and_versions_are_collected(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, busy(tmp_path, "innovation")) as coordinator:
        with Crowd(coordinator, 4) as crowd:
            seen = Seen()
            for number in range(2):
                time.sleep(0.5)
                before, out = crowd.acknowledged, tmp_path / f"backup {number}"
                done = command("coordinator.cli", "backup", "--data", coordinator.data, "--out", out)
                assert done.returncode == 0, done.stderr
                assert f"copied to {out}" in done.stdout
                seen.check(out, before)
                assert temporaries(out) == []
                assert (out / "join-token").stat().st_mode & 0o777 == 0o600
                assert (out / "join-token").read_text() == (coordinator.data / "join-token").read_text()
            assert before
        assert coordinator.stop() == 0
        assert "Traceback" not in coordinator.log.read_text()


def test_a_restored_folder_goes_on_with_the_devices_that_it_knew(tmp_path: Path) -> None:
    """And its second version 2 is told from the first by its start."""
    config = configuration(tmp_path, {"buffer_size": 2, "timeout_s": 600.0})
    out = tmp_path / "restored" / "data"
    with (
        CoordinatorProcess(tmp_path, config) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
    ):
        for seed, device in enumerate((one, two)):
            device.hand_in(device.work(), seed=seed)
        waited_for(coordinator, 1)
        buffered = one.work()
        one.hand_in(buffered, seed=3)
        done = command("coordinator.cli", "backup", "--data", coordinator.data, "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("version 1, 1 buffered updates, 2 files copied to ")
        two.hand_in(two.work(), seed=4)
        waited_for(coordinator, 2)
        start = two.status().start
        assert coordinator.stop() == 0
    assert {path.name for path in out.iterdir()} == {
        DATABASE,
        *("folder.json", "join-token", "blobs", "uploads", "cache"),
    }
    with CoordinatorProcess(out.parent, config) as restored:
        transport, host = (
            Transport(restored.url, two.credential),
            Transport(restored.url, restored.host_token),
        )
        again = Device(transport, two.id, two.credential, host)
        assert (again.status().version, again.status().buffered) == (1, 1)
        again.hand_in(again.work(), seed=5)
        waited_for(restored, 2)
        assert again.status().start != start
        transport.close()
        host.close()
        assert restored.stop() == 0
        seen = Seen()
        seen.check(restored.data, [buffered.id])
        assert seen.merged[buffered.id] == 2


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a coordinator that was stopped, with two versions."""
    folder = tmp_path_factory.mktemp("original")
    config = configuration(folder, {"buffer_size": 1}) + "[storage]\nkeep_versions = 5\n"
    with CoordinatorProcess(folder, config) as coordinator, member(coordinator) as device:
        for number in (1, 2):
            device.hand_in(device.work(), seed=number)
            waited_for(coordinator, number)
        assert coordinator.stop() == 0
    return coordinator.data


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("point", BACKING_UP)
def test_a_backup_that_broke_off_is_none(run: Run, data: Path, tmp_path: Path, point: Point) -> None:
    out = tmp_path / "out"
    arguments = ("backup", "--data", data, "--out", out)
    done = command("coordinator.cli", *arguments, environ={VARIABLE: f"{point}=kill"})
    assert done.returncode == -9
    assert done.stderr == f"reached {point}, time 1: killed\n"
    config = tmp_path / "c.toml"
    config.write_text(configuration(tmp_path))
    for again, reason in (
        (("status", "--data", out), "no coordinator data here"),
        (("serve", "--data", out, "--config", config), "this backup broke off and is not whole"),
        (arguments, "is there and not empty; name a new folder"),
    ):
        done = run(*again)
        assert done.returncode == 2
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    assert run("backup", "--data", data, "--out", tmp_path / "b").returncode == 0
    Seen().check(tmp_path / "b", [])


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_a_backup_that_the_disk_does_not_take_is_one_line(
    run: Run, data: Path, tmp_path: Path, error: str
) -> None:
    done = run("backup", "--data", data, "--out", tmp_path / "out", fail=f"backup-blob={error}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"edge-coordinator: {tmp_path}/out: the backup failed (")
    assert done.stderr.count("\n") == 1


def test_what_is_no_data_folder_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no coordinator data here"):
        backup.back_up(tmp_path, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", data):
        with pytest.raises(InputError, match="is there and not empty"):
            backup.back_up(data, out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_blob_is_linked_or_copied(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((digest,),) = rows(data, "SELECT digest FROM versions WHERE version = 2")
    backup.back_up(data, tmp_path / "linked")
    assert blob(tmp_path / "linked", digest).stat().st_ino == blob(data, digest).stat().st_ino

    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    backup.back_up(data, tmp_path / "copied")
    assert blob(tmp_path / "copied", digest).stat().st_ino != blob(data, digest).stat().st_ino
    Seen().check(tmp_path / "copied", [])


def test_a_blob_that_goes_meanwhile_is_not_missed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the rows and the blobs the older version is collected: the rows are copied again."""
    copies: list[Path] = []
    write_copy = backup.write_copy

    def then_collected(db: sqlite3.Connection, to: Path) -> None:
        write_copy(db, to)
        copies.append(to)
        if len(copies) == 1:
            store, blobs = Store(data / DATABASE), Blobs(data)
            assert Collector(store, blobs, 1, -1).run().versions == (1,)
            store.close()

    monkeypatch.setattr(backup, "write_copy", then_collected)
    made = backup.back_up(data, tmp_path / "out")
    assert (made.version, made.files, len(copies)) == (2, 1, 2)
    assert rows(tmp_path / "out", "SELECT collected FROM versions ORDER BY version") == [(1,), (0,)]
    Seen().check(tmp_path / "out", [])


def test_a_blob_that_is_lost_is_told(data: Path, tmp_path: Path) -> None:
    ((digest,),) = rows(data, "SELECT digest FROM versions WHERE version = 1")
    content = blob(data, digest).read_bytes()
    blob(data, digest).write_bytes(content[:-3] + bytes([content[-3] ^ 0x10]) + content[-2:])
    with pytest.raises(InputError, match=f"blob {digest} is damaged"):
        backup.back_up(data, tmp_path / "damaged")
    blob(data, digest).unlink()
    with pytest.raises(InputError, match=f"blob {digest} is needed and not there"):
        backup.back_up(data, tmp_path / "gone")
    for out in ("damaged", "gone"):
        assert not (tmp_path / out / DATABASE).exists()
