"""Data folders of every older schema: migrated after a copy, whatever step is the last before a kill."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from coordinator.storage.failpoints import VARIABLE
from coordinator.storage.schema import MIGRATIONS
from coordinator.storage.store import Store
from tests.coordinator.devices import configuration, member
from tests.faults.conftest import Run
from tests.faults.outside import Seen, rows
from tests.faults.test_backup import waited_for
from tests.processes import CoordinatorProcess, command

DATABASE = "coordinator.sqlite"
NEWEST = len(MIGRATIONS)
OLDER = range(1, NEWEST)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data folder with a version and a buffered update, and its configuration."""
    folder = tmp_path_factory.mktemp("original")
    config = configuration(folder, {"buffer_size": 2, "timeout_s": 600.0})
    with (
        CoordinatorProcess(folder, config) as coordinator,
        member(coordinator, "one") as one,
        member(coordinator, "two") as two,
    ):
        for seed, device in enumerate((one, two)):
            device.hand_in(device.work(), seed=seed)
        waited_for(coordinator, 1)
        one.hand_in(one.work(), seed=3)
        assert coordinator.stop() == 0
    return coordinator.data, config


def of_schema(original: Path, folder: Path, schema: int) -> Path:
    """The same data folder as an older coordinator would have written it."""
    data = folder / "data"
    shutil.copytree(original, data)
    (data / DATABASE).unlink()
    with contextlib.closing(sqlite3.connect(data / DATABASE)) as db:
        for script in MIGRATIONS[:schema]:
            db.executescript(script)
        db.execute("ATTACH ? AS newer", (str(original / DATABASE),))
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if "runs" not in tables:
            (data / "folder.json").unlink()
        for table in ("devices", *(name for name in tables if name != "devices")):
            newer = {row[1] for row in db.execute(f"PRAGMA newer.table_info({table})")}
            older = [row[1] for row in db.execute(f"PRAGMA main.table_info({table})")]
            columns = ", ".join(name for name in older if name in newer)
            db.execute(f"INSERT INTO main.{table}({columns}) SELECT {columns} FROM newer.{table}")
        db.execute(f"PRAGMA user_version = {schema}")
        db.commit()
    return data


def test_a_device_that_was_revoked_before_there_were_standings_still_is(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE)) as db:
        for script in MIGRATIONS[:10]:
            db.executescript(script)
        for id, revoked in (("d", 0), ("e", 1)):
            values = f"('{id}', '{id}', 'hash of {id}', '{{}}', 5.0, {revoked})"
            columns = "id, name, credential_hash, profile, joined_at, revoked"
            db.execute(f"INSERT INTO devices({columns}) VALUES {values}")
        db.execute("PRAGMA user_version = 10")
        db.commit()
    store = Store(tmp_path / DATABASE)
    assert store.members.standings() == {"e": "revoked"}
    assert store.members.credentials() == {"hash of d": "d"}
    assert store.members.credential_times() == {"d": 5.0, "e": 5.0}
    store.close()


def check_the_copy(data: Path, schema: int) -> None:
    """It is as the database was before, whole in one file."""
    copy = data / f"{DATABASE}.schema-{schema}.bak"
    with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (schema,)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT COUNT(*) FROM updates").fetchone() == (3,)
    assert not list(data.glob(f"{DATABASE}.schema-*.bak-*"))


def check_that_it_goes_on(folder: Path, config: str) -> None:
    with CoordinatorProcess(folder, config) as coordinator:
        with member(coordinator, "three") as three:
            status = three.status()
            assert (status.version, status.buffered) == (1, 1)
            work = three.work()
            three.hand_in(work, seed=9)
        waited_for(coordinator, 2)
        assert coordinator.stop() == 0
        assert rows(coordinator.data, "PRAGMA user_version") == [(NEWEST,)]
        Seen().check(coordinator.data, [work.id])


@pytest.mark.parametrize("schema", OLDER)
def test_an_older_schema_is_migrated_after_a_copy(
    run: Run, original: tuple[Path, str], tmp_path: Path, schema: int
) -> None:
    data = of_schema(original[0], tmp_path, schema)
    for bystander in (["status"], ["backup", "--out", tmp_path / "out"]):
        done = run(*bystander, "--data", data)
        assert done.returncode == 2
        assert f"schema {schema} is older than this program's {NEWEST}; the next " in done.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    check_that_it_goes_on(tmp_path, original[1])
    check_the_copy(data, schema)
    log = (tmp_path / "coordinator.log").read_text()
    assert f"schema {schema} becomes {NEWEST}; {data}/{DATABASE}.schema-{schema}.bak is as it was" in log


@pytest.mark.parametrize(
    "point",
    [
        "migration-copied",
        "migration-copy-renamed",
        "migration-written@1",
        "migration-committed@1",
        f"migration-written@{NEWEST - 1}",
    ],
)
def test_killed_in_a_migration(original: tuple[Path, str], tmp_path: Path, point: str) -> None:
    data = of_schema(original[0], tmp_path, 1)
    config = tmp_path / "c.toml"
    config.write_text(original[1])
    serve = ("serve", "--data", data, "--config", config, "--port", 0)
    done = command("coordinator.cli", *serve, environ={VARIABLE: f"{point}=kill"})
    assert done.returncode == -9
    assert f"reached {point.split('@', maxsplit=1)[0]}, time" in done.stderr
    check_that_it_goes_on(tmp_path, original[1])
    check_the_copy(data, 1)
    assert not [path for path in data.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("point", ["migration-copied", "migration-written"])
def test_a_migration_that_the_disk_does_not_take_changes_nothing(
    run: Run, original: tuple[Path, str], tmp_path: Path, point: str
) -> None:
    data = of_schema(original[0], tmp_path, 2)
    config = tmp_path / "c.toml"
    config.write_text(original[1])
    serve = ("serve", "--data", data, "--config", config, "--port", 0)
    done = run(*serve, fail=f"{point}=ENOSPC")
    assert done.returncode == 2
    assert f"edge-coordinator: {data}/{DATABASE}: " in done.stderr
    assert rows(data, "PRAGMA user_version") == [(2,)]
    check_that_it_goes_on(tmp_path, original[1])


def test_a_newer_schema_is_refused_by_every_command(
    run: Run, original: tuple[Path, str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(original[0], data)
    config = tmp_path / "c.toml"
    config.write_text(original[1])
    with contextlib.closing(sqlite3.connect(data / DATABASE)) as db:
        db.execute(f"PRAGMA user_version = {NEWEST + 1}")
    for name, *more in (["serve", "--config", config], ["status"], ["backup", "--out", tmp_path / "out"]):
        done = run(name, "--data", data, *more)
        assert done.returncode == 2
        assert done.stderr.startswith(f"edge-coordinator: {data}/{DATABASE}: ")
        assert f"schema {NEWEST + 1} is newer than this coordinator's {NEWEST}; update it" in done.stderr
        assert done.stderr.count("\n") == 1
