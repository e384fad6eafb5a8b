"""What a device remembers: whole, private, and never half written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from edge_sdk.core.errors import InputError, Unwritable
from edge_sdk.membership.journal import Journal
from edge_sdk.membership.session import Session, delivered
from edge_sdk.system.durable import write_durably
from tests.edge_sdk.membership.test_session import IDLE, OUTBOX, TRAINING


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "state")


def test_a_new_device_remembers_nothing(journal: Journal) -> None:
    assert journal.load() is None
    assert journal.adapters.is_dir()


@pytest.mark.parametrize("session", [IDLE, TRAINING, OUTBOX, delivered(OUTBOX, 9)])
def test_a_session_comes_back_as_it_was(journal: Journal, session: Session) -> None:
    journal.save(IDLE)
    journal.save(session)
    assert Journal(journal.folder).load() == session


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_the_credential_is_for_the_owners_eyes(journal: Journal) -> None:
    (journal.folder / ".session.json.tmp").touch(mode=0o644)  # left by a crash
    journal.save(IDLE)
    assert stat.S_IMODE((journal.folder / "session.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"url": 3}'])
def test_a_damaged_session_is_named(journal: Journal, content: bytes) -> None:
    (journal.folder / "session.json").write_bytes(content)
    with pytest.raises(InputError, match=r"session.json: not a session \(.*\); remove it to join anew"):
        journal.load()


@pytest.mark.parametrize("name", ["setting", "credential", "federation"])
def test_a_session_of_an_older_release_gives_one_line(journal: Journal, name: str) -> None:
    """One that lacks what this release needs, as if the field had come later."""
    journal.save(TRAINING)
    path = journal.folder / "session.json"
    record = json.loads(path.read_text())
    del record[name]
    path.write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=rf"^\S*session.json: not a session \(Session.{name} is missing.*anew$"
    ):
        journal.load()


def test_a_session_that_cannot_be_read_gives_one_line(journal: Journal) -> None:
    (journal.folder / "session.json").mkdir()
    with pytest.raises(InputError, match=r"session.json: cannot be read \(Is a directory\)"):
        journal.load()


def test_a_session_of_a_newer_protocol_is_named(journal: Journal) -> None:
    journal.save(IDLE)
    path = journal.folder / "session.json"
    record = json.loads(path.read_text())
    record["federation"]["protocol"] = 2
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="protocol 2"):
        journal.load()


def test_finished_work_is_kept_until_it_is_cleared(journal: Journal) -> None:
    journal.outbox.write_bytes(b"adapter")
    journal.checkpoint.write_bytes(b"checkpoint")
    assert Journal(journal.folder).outbox.read_bytes() == b"adapter"
    journal.clear_work()
    journal.clear_work()
    assert not journal.outbox.exists()
    assert not journal.checkpoint.exists()


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def broken(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Unwritable, match=r"file cannot be written \(No space left on device\); make room"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]  # half a file takes room, too


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="file: no usable state folder"):
        Journal(tmp_path / "file")
