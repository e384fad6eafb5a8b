"""A database that is damaged or not the folder's: every command says so in one line, and changes nothing."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.storage.schema import MIGRATIONS
from coordinator.storage.store import Store
from tests.coordinator.devices import configuration, member
from tests.faults.conftest import Run
from tests.faults.test_backup import waited_for
from tests.processes import CoordinatorProcess

COMMANDS = ("serve", "status", "export", "backup")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorProcess:
    """A coordinator that was stopped, with two versions in its folder."""
    folder = tmp_path_factory.mktemp("original")
    with CoordinatorProcess(folder, configuration(folder, {"buffer_size": 1})) as coordinator:
        with member(coordinator) as device:
            for number in (1, 2):
                device.hand_in(device.work(), seed=number)
                waited_for(coordinator, number)
        assert coordinator.stop() == 0
    return coordinator


def header(path: Path) -> None:
    path.write_bytes(b"\xa5" * 100 + path.read_bytes()[100:])


def header_fields(path: Path) -> None:
    """All but the name of the format."""
    content = path.read_bytes()
    path.write_bytes(content[:16] + b"\xa5" * 84 + content[100:])


def page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * 4096 + content[8192:])


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 100])


def cut_in_its_last_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def text(path: Path) -> None:
    path.write_text("this is no database, whatever its name says\n" * 400)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def another_program_s(path: Path, number: int = 0) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE bookmarks (url TEXT); PRAGMA user_version = {number};")


def another_program_s_of_our_number(path: Path) -> None:
    another_program_s(path, len(MIGRATIONS))


def another_program_s_of_a_higher_number(path: Path) -> None:
    another_program_s(path, 1 << 20)


def another_program_s_of_a_negative_number(path: Path) -> None:
    another_program_s(path, -1)


def without_a_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE updates")


def emptied(path: Path, *kept: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in set(names) - set(kept):
            db.execute(f"DELETE FROM {name}")
        db.commit()


def emptied_but_for_the_federation(path: Path) -> None:
    emptied(path, "meta")


def emptied_but_for_federation_and_runs(path: Path) -> None:
    emptied(path, "meta", "runs")


def begun_anew(path: Path) -> None:
    path.unlink()
    Store(path).close()


def a_record_that_is_none(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE meta SET value = substr(value, 9) WHERE key = 'federation'")
        db.commit()


KINDS: list[Callable[[Path], None]] = [
    header,
    header_fields,
    page,
    cut_in_half,
    cut_in_its_last_page,
    text,
    zeros,
    nothing,
    another_program_s,
    another_program_s_of_our_number,
    another_program_s_of_a_higher_number,
    another_program_s_of_a_negative_number,
    without_a_table,
    emptied,
    emptied_but_for_the_federation,
    emptied_but_for_federation_and_runs,
    begun_anew,
    a_record_that_is_none,
]


@pytest.mark.parametrize("spoil", KINDS)
def test_a_damaged_database_is_refused_by_every_command(
    run: Run, original: CoordinatorProcess, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(original.data, data)
    spoil(data / "coordinator.sqlite")
    (data / "coordinator.sqlite").chmod(0o600)
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    more = {"serve": ["--config", original.config, "--port", 99999], "status": []}
    for name in COMMANDS:
        done = run(name, "--data", data, *more.get(name, ["--out", out]))
        assert (done.returncode, done.stdout) == (2, ""), (name, done.stdout)
        assert done.stderr.startswith(f"edge-coordinator: {data}"), (name, done.stderr)
        assert "; restore the " in done.stderr, (name, done.stderr)
        assert done.stderr.count("\n") == 1, (name, done.stderr)
        assert not out.exists()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "damage", ["substr(record, 9)", "replace(record, '\"steps\":20', '\"steps\":1' || printf('%0400d', 0))"]
)
def test_an_update_whose_record_is_damaged_costs_its_own_device(tmp_path: Path, damage: str) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path, {"buffer_size": 2})) as coordinator:
        with member(coordinator, "one") as one, member(coordinator, "two") as two:
            bad = one.work()
            one.hand_in(bad)
            assert coordinator.stop() == 0
            with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as db:
                db.execute(f"UPDATE updates SET record = {damage}")
                db.commit()
            coordinator.start()
            for seed, device in enumerate((one, two)):
                device.hand_in(device.work(), seed=seed)
            waited_for(coordinator, 1)
        assert coordinator.stop() == 0
        with contextlib.closing(sqlite3.connect(coordinator.data / "coordinator.sqlite")) as db:
            db.execute(f"UPDATE updates SET record = {damage}")  # merged by now: nobody needs it any more
            db.commit()
        coordinator.start()
        assert coordinator.stop() == 0
        log = coordinator.log.read_text()
        assert f"update {bad.id} is left out: a record in the database is damaged (" in log
        assert "Traceback" not in log


def test_a_folder_without_its_database_says_how_to_restore(
    run: Run, original: CoordinatorProcess, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(original.data, data)
    (data / "coordinator.sqlite").unlink()
    for arguments in (["status"], ["export", "--out", out], ["backup", "--out", out]):
        done = run(*arguments, "--data", data)
        assert done.returncode == 2
        assert "no coordinator data here, but folder.json is: restore the folder from a backup" in done.stderr
        assert not (data / "coordinator.sqlite").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"federation": 1}', b"\xff" * 40])
def test_a_damaged_file_beside_it_is_told(
    run: Run, original: CoordinatorProcess, tmp_path: Path, content: bytes
) -> None:
    data = tmp_path / "data"
    shutil.copytree(original.data, data)
    (data / "folder.json").write_bytes(content)
    done = run("serve", "--data", data, "--config", original.config, "--port", 99999)
    assert done.returncode == 2
    assert f"{data}/folder.json is damaged (" in done.stderr
    assert "where nothing but this file was lost, remove it" in done.stderr
    assert done.stderr.count("\n") == 1
