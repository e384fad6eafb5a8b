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
