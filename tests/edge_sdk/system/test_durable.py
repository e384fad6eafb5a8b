"""Files replaced as a whole: the old content or the new, whatever goes wrong, and in which order."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.system import durable
from edge_sdk.system.durable import move_into_place, replacing


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the disk, in order."""
    seen: list[str] = []
    fsync: Callable[[int], None] = os.fsync

    def noted(descriptor: int) -> None:
        seen.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_bytes_are_on_disk_before_the_name_and_the_name_before_anybody_is_told(
    tmp_path: Path, steps: list[str]
) -> None:
    with replacing(tmp_path / "file", at=steps.append) as file:
        file.write(b"new")
        assert not (tmp_path / "file").exists()
    assert steps == ["fsync file", "written", "renamed", "fsync folder"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_what_can_be_made_again_does_not_wait_for_the_disk(tmp_path: Path, steps: list[str]) -> None:
    with replacing(tmp_path / "file", lasting=False, at=steps.append) as file:
        file.write(b"new")
    assert steps == ["written", "renamed"]


@pytest.mark.parametrize("step", ["writing", "written"])
def test_what_fails_changes_nothing_and_leaves_nothing(tmp_path: Path, step: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(reached: str) -> None:
        if reached == step:
            raise OSError(28, "No space left on device")

    def write() -> None:
        with replacing(path, at=fails) as file:
            file.write(b"half")
            fails("writing")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_else_can_read_a_secret_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"left by a crash, readable by all")
    with replacing(tmp_path / "file", mode=0o600) as file:
        file.write(b"secret")
        file.flush()
        assert (tmp_path / ".file.tmp").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_complete_gets_its_name_last(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "part").write_bytes(b"all of it")
    move_into_place(tmp_path / "part", tmp_path / "whole", at=steps.append)
    assert steps == ["fsync file", "written", "renamed", "fsync folder"]
    assert (tmp_path / "whole").read_bytes() == b"all of it"
    assert not (tmp_path / "part").exists()


def test_a_folder_is_made_where_a_device_needs_one(tmp_path: Path) -> None:
    durable.write_durably(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


# --- whose they are ---


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with a file and a folder of ours, and nothing else yet."""
    (tmp_path / "lock").touch(0o644)
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "1").touch(0o644)
    for path in (tmp_path, tmp_path / "blobs", tmp_path / "blobs" / "ab"):
        path.chmod(0o755)
    return tmp_path


OURS = ("lock", "blobs", "state.*")


def test_all_that_is_ours_is_taken_from_others_and_said_once(mixed: Path) -> None:
    said = durable.make_private(mixed, OURS)
    assert said == (
        f"{mixed}: other users could read the folder itself, blobs, {Path('blobs/ab')} and 2 more; "
        "now only you can"
    )
    assert mode(mixed) == mode(mixed / "blobs" / "ab") == 0o700
    assert mode(mixed / "lock") == mode(mixed / "blobs" / "ab" / "1") == 0o600
    assert durable.make_private(mixed, OURS) is None


def test_what_is_not_ours_stays_as_it_is(mixed: Path) -> None:
    """A host may keep other files there, or have named a home folder."""
    (mixed / "thesis.tex").touch(0o644)
    said = durable.make_private(mixed, OURS)
    assert said is not None
    assert "itself" not in said
    assert mode(mixed) == 0o755
    assert mode(mixed / "thesis.tex") == 0o644
    assert mode(mixed / "lock") == 0o600


def test_a_folder_where_everybody_may_write_stays_one(mixed: Path) -> None:
    mixed.chmod(0o1777)
    assert durable.make_private(mixed, OURS) is not None
    assert mode(mixed) == 0o1777


def test_links_are_not_followed(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch(0o644)
    elsewhere.chmod(0o755)
    (mixed / "state.link").symlink_to(elsewhere)
    (mixed / "blobs" / "link").symlink_to(elsewhere / "file")
    durable.make_private(mixed, OURS)
    assert mode(elsewhere) == 0o755
    assert mode(elsewhere / "file") == 0o644


def test_a_folder_that_is_not_there_needs_no_mending(tmp_path: Path) -> None:
    assert durable.make_private(tmp_path / "none", OURS) is None


def test_what_a_command_makes_is_its_users_alone_but_for_what_is_handed_on(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with durable.private():
            (tmp_path / "own").touch()
            with durable.for_others():
                (tmp_path / "handed on").touch()
            (tmp_path / "own again").touch()
        (tmp_path / "after").touch()
    finally:
        os.umask(before)
    assert mode(tmp_path / "own") == mode(tmp_path / "own again") == 0o600
    assert mode(tmp_path / "handed on") == mode(tmp_path / "after") == 0o644
