"""What either side writes is its user's alone, whatever the umask; what was not is mended with a word."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.service.coordinator import Coordinator
from coordinator.settings import load_settings
from edge_sdk.core.records import to_json
from edge_sdk.model import base_model
from tests.coordinator.devices import configuration, member
from tests.models import build_model
from tests.processes import CoordinatorProcess, environment, toml

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")

WITH_UMASK = ["sh", "-c", 'umask 022; exec "$@"', "sh"]
PATIENCE_S = 120.0
NOBODY = 65534
# Another user's program: it tries to read each file, and to hold it with a lock.
OF_ANOTHER_USER = """
import fcntl, os, sys
for path in sys.stdin.read().splitlines():
    try:
        fcntl.lockf(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)
    except PermissionError:
        continue
    print(path)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that every user may enter, as a home folder often is."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def run(folder: Path, module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*WITH_UMASK, sys.executable, "-m", module, *map(str, arguments)],
        env=environment() | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def join(coordinator: CoordinatorProcess, folder: Path, updates: int) -> str:
    """One whole run of a device; what it said."""
    notes = folder / "notes.jsonl"
    notes.write_text('{"prompt": "turn the light on", "completion": "done"}\n' * 4)
    where = ("--state", folder / "state", "--data", notes, "--token", coordinator.join_token)
    how = ("--model", folder / "base", "--updates", updates, "--no-quantise", "--device", "cpu", "--nice", 0)
    return run(folder, "edge_sdk.cli", "join", coordinator.url, *where, *how).stdout


def federation(folder: Path) -> CoordinatorProcess:
    base = base_model.describe(str(build_model(folder / "base", "llama")))
    (folder / "base.json").write_text(json.dumps(to_json(base)))
    training = {"steps": 2, "batch": 4, "sequence_len": 32, "checkpoint_s": 0.001}
    config = {"training": training, "policy": {"buffer_size": 1, "retry_s": 0.1}}
    made = CoordinatorProcess(folder, toml(config, folder / "base.json"))
    made.before = WITH_UMASK
    return made


def open_to_others(*folders: Path) -> list[str]:
    """All below that another user has a right to."""
    found = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    assert len(found) > 5
    return [str(path) for path in found if stat.S_IMODE(path.lstat().st_mode) & 0o077]


def readable_by_another_user(*folders: Path) -> str:
    """Tried by one, where this process may become one."""
    paths = "\n".join(str(path) for folder in folders for path in folder.rglob("*") if path.is_file())
    if os.geteuid() != 0:
        return ""
    program = ["/usr/bin/env", "python3", "-c", OF_ANOTHER_USER]
    done = subprocess.run(program, input=paths, user=NOBODY, capture_output=True, text=True, check=True)
    return done.stdout


def test_what_both_sides_make_is_their_users_alone(folder: Path) -> None:
    """A coordinator, a device from joining to its second update, a backup: only an export is for others."""
    with federation(folder) as coordinator:
        join(coordinator, folder, 2)
        run(folder, "coordinator.cli", "backup", "--data", coordinator.data, "--out", folder / "backup")
        run(folder, "coordinator.cli", "export", "--data", coordinator.data, "--out", folder / "export")
        made = [coordinator.data, folder / "state", folder / "backup"]
        assert (coordinator.data / "coordinator.sqlite-shm").exists()
        assert open_to_others(*made, folder / "cache") == []
        assert readable_by_another_user(*made) == ""
    exported = folder / "export"
    assert stat.S_IMODE(exported.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == {0o644}


def loosen(folder: Path) -> None:
    """As releases before made them."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_folders_of_an_earlier_release_are_mended_with_a_word(folder: Path) -> None:
    with federation(folder) as coordinator:
        join(coordinator, folder, 1)
        coordinator.stop()
        loosen(coordinator.data)
        loosen(folder / "state")
        coordinator.start()
        said = join(coordinator, folder, 1)
        assert (
            f"{coordinator.data}: other users could read the folder itself, " in coordinator.log.read_text()
        )
        assert f"{folder / 'state'}: other users could read the folder itself, " in said
        assert open_to_others(coordinator.data, folder / "state") == []
        coordinator.stop()
        before = coordinator.log.stat().st_size
        coordinator.start()
        assert "other users" not in coordinator.log.read_text()[before:]
        assert "other users" not in join(coordinator, folder, 1)


def test_a_coordinator_that_an_application_embeds_keeps_its_files_to_itself(folder: Path) -> None:
    (folder / "coordinator.toml").write_text(configuration(folder))

    async def open_it() -> None:
        coordinator = Coordinator(folder / "data", load_settings(folder / "coordinator.toml"))
        assert open_to_others(folder / "data") == []
        await coordinator.close()

    before = os.umask(0o022)
    try:
        asyncio.run(open_it())
        loosen(folder / "data")
        asyncio.run(open_it())
    finally:
        os.umask(before)


def test_another_users_lock_on_the_database_keeps_nobody_from_joining(folder: Path) -> None:
    """It was a read lock on the file that SQLite shares between processes: now nobody else can open that."""
    with CoordinatorProcess(folder, configuration(folder)) as coordinator:
        with member(coordinator):
            pass
        shared = coordinator.data / "coordinator.sqlite-shm"
        assert stat.S_IMODE(shared.stat().st_mode) == 0o600
        assert readable_by_another_user(coordinator.data) == ""
        with member(coordinator, "kitchen") as device:
            device.work()
