"""Data folders that are not what they seem: with an older database, with another's, and copies that run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.connection.transport import Transport
from edge_sdk.core.messages import Ask, Assignment, NotNow
from tests.coordinator.devices import Device, configuration, member
from tests.faults.outside import Seen, rows
from tests.faults.test_backup import waited_for
from tests.processes import CoordinatorProcess, command

DATABASE = "coordinator.sqlite"
POLICY: dict[str, object] = {"buffer_size": 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder as it was when its coordinator stopped, with two versions; and after one more."""
    folder = tmp_path_factory.mktemp("original")
    with CoordinatorProcess(folder, configuration(folder, POLICY)) as coordinator:
        with member(coordinator) as device:
            for number in (1, 2):
                device.hand_in(device.work(), seed=number)
                waited_for(coordinator, number)
            assert coordinator.stop() == 0
            shutil.copytree(coordinator.data, folder / "older")
            coordinator.start()
            device.hand_in(device.work(), seed=3)
            waited_for(coordinator, 3)
        assert coordinator.stop() == 0
    return folder / "older", coordinator.data


@pytest.fixture
def placed(original: tuple[Path, Path], tmp_path: Path) -> Iterator[CoordinatorProcess]:
    """A coordinator, not started, on a copy of the newest folder."""
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path, POLICY))
    shutil.copytree(original[1], coordinator.data)
    yield coordinator
    coordinator.kill()


def files(data: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}


def refused(coordinator: CoordinatorProcess) -> str:
    """What `serve`, `status`, `export` and `backup` say of it; nothing in the folder is changed by them."""
    before, said = files(coordinator.data), set()
    out = coordinator.data.parent / "out"
    for name, *more in (
        ("serve", "--config", coordinator.config, "--port", 0),
        ("status",),
        ("export", "--out", out),
        ("backup", "--out", out),
    ):
        done = command("coordinator.cli", name, "--data", coordinator.data, *more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        said.add(done.stderr)
    assert files(coordinator.data) == before
    (line,) = said
    assert "; restore the whole folder from a backup, never the database alone\n" in line
    return line


def test_an_older_database_put_back_by_itself(
    original: tuple[Path, Path], placed: CoordinatorProcess
) -> None:
    """It would collect version 3, and give its number to another adapter."""
    newest = (placed.data / DATABASE).read_bytes()
    (placed.data / DATABASE).write_bytes((original[0] / DATABASE).read_bytes())
    assert "ends at version 2, but version 3 was published here (folder.json)" in refused(placed)
    (placed.data / DATABASE).write_bytes(newest)
    placed.start()
    with member(placed) as device:
        device.hand_in(device.work(), seed=4)
    waited_for(placed, 4)
    assert placed.stop() == 0
    Seen().check(placed.data, [])


def test_an_older_database_of_the_same_version(placed: CoordinatorProcess) -> None:
    """Nothing was published since, but devices have joined."""
    older = (placed.data / DATABASE).read_bytes()
    placed.start()
    with member(placed, "new"):
        pass
    assert placed.stop() == 0
    (placed.data / DATABASE).write_bytes(older)
    assert "does not know run 3-" in refused(placed)


def test_the_database_of_another_folder(placed: CoordinatorProcess, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with CoordinatorProcess(tmp_path / "other", configuration(tmp_path / "other", POLICY)) as other:
        assert other.stop() == 0
    shutil.copyfile(other.data / DATABASE, placed.data / DATABASE)
    mine, its = (json.loads((at.data / "folder.json").read_text())["federation"] for at in (placed, other))
    assert f"is of federation {its}, the folder of {mine} (folder.json)" in refused(placed)


def test_a_folder_of_before_there_was_such_a_file(placed: CoordinatorProcess) -> None:
    (placed.data / "folder.json").unlink()
    placed.start()
    assert placed.stop() == 0
    ((number, id),) = rows(placed.data, "SELECT number, id FROM runs ORDER BY number DESC LIMIT 1")
    said = json.loads((placed.data / "folder.json").read_text())
    assert (said["run"], said["version"]) == (f"{number}-{id}", 3)


# --- a copy that runs -------------------------------------------------------------------------------


def asked(device: Device, run: str) -> Assignment | NotNow:
    return device.transport.ask(Ask(4, 0, run))


def words(coordinator: CoordinatorProcess, device: Device) -> int:
    """How often its host was told of this device."""
    said = f"device {device.id} has worked with another coordinator of this federation (run "
    return coordinator.log.read_text().count(said)


def test_two_coordinators_on_copies_of_one_folder(placed: CoordinatorProcess, tmp_path: Path) -> None:
    """A device that comes from one to the other is told of, on either side, once; and it gets its work."""
    placed.start()
    with member(placed) as device:
        run = device.work().run
        assert not asked(device, run).elsewhere
        assert placed.stop() == 0
        shutil.copytree(placed.data, tmp_path / "second" / "data")
        placed.start()
        with CoordinatorProcess(tmp_path / "second", placed.config.read_text()) as copy:
            here = f":{placed.data.resolve()} (inode {placed.data.stat().st_ino}) when it last ran"
            moved = copy.log.read_text().splitlines()[0]
            assert "this folder was at " in moved
            assert here in moved
            assert moved.endswith("if a coordinator still runs there, stop one of the two")
            first = asked(device, run)
            assert first.elsewhere is False  # they have this run in common
            assert isinstance(first, Assignment)
            other = Device(Transport(copy.url, device.credential), device.id, device.credential)
            for _ in range(3):
                work = asked(other, first.run)
                assert work.elsewhere
            assert isinstance(work, Assignment)
            other.hand_in(work, seed=5)
            back = asked(device, work.run)
            assert back.elsewhere
            assert (words(placed, device), words(copy, device)) == (1, 1)
            for each in (placed, copy):
                said = command("coordinator.cli", "status", "--data", each.data).stdout
                assert said.count(f"device {device.id} has worked with another coordinator") == 1
            other.transport.close()
            assert copy.stop() == 0
    assert placed.stop() == 0
    Seen().check(placed.data, [])
    Seen().check(copy.data, [work.id])


def test_a_member_that_makes_up_runs(placed: CoordinatorProcess) -> None:
    """A line, however many it thinks of; and none of them gets into a line of the log by itself."""
    placed.start()
    with member(placed) as device:
        for number in range(1, 40):
            assert asked(device, f"{number}-{number:08x}").elsewhere
        assert words(placed, device) == 1
        assert len(rows(placed.data, "SELECT run FROM elsewhere")) == 1
    assert placed.stop() == 0
    assert "Traceback" not in placed.log.read_text()
