"""What a failing disk is called, whether a fail-point or SQLite says so; and how often the log does."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.service.fault_log import FaultLog
from coordinator.storage import disk, failpoints
from coordinator.storage.blobs import Blobs
from coordinator.storage.disk import blaming, disk_error, write_all
from coordinator.storage.store import Store
from edge_sdk.core.errors import DiskFull, InternalError, OurFault

HASHES = iter(f"hash {number}" for number in range(10_000))


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def join(store: Store, size_bytes: int = 100) -> None:
    hash = next(HASHES)
    store.members.add_device(hash, "a device", hash, {"text": "x" * size_bytes}, 1.0)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EROFS, InternalError),
        (errno.EIO, InternalError),
        (errno.EACCES, InternalError),
        (errno.EMFILE, InternalError),
    ],
)
def test_an_error_of_the_system_has_a_class_and_names_file_and_cause(
    number: int, kind: type[OurFault]
) -> None:
    cause = OSError(number, "the cause", "/somewhere/data/uploads/a.part")
    named = r" uploads/a\.part \(the cause\); its host must"
    with pytest.raises(kind, match=named) as raised, blaming("another file"):
        raise cause
    assert raised.value.__cause__ is cause
    assert raised.value.status == (507 if kind is DiskFull else 500)
    with pytest.raises(kind, match=r" another file \(the cause\)"), blaming("another file"):
        raise OSError(number, "the cause")


def test_what_no_disk_is_to_blame_for_stays_what_it_is() -> None:
    assert disk_error("f", sqlite3.IntegrityError("UNIQUE constraint failed")) is None
    with pytest.raises(sqlite3.OperationalError, match="no such table"), blaming("f"):
        sqlite3.connect(":memory:").execute("SELECT * FROM versions")
    with pytest.raises(KeyError), blaming("f"):
        raise KeyError


def at_most(store: Store, pages: int) -> None:
    """A limit of the connection that writes."""
    with store.db.transaction("meta-written", "meta-committed") as db:
        db.execute(f"PRAGMA max_page_count = {pages}")


def test_a_full_database_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """SQLITE_FULL from SQLite itself, for one transaction and for several in one commit."""
    store = Store(tmp_path / "coordinator.sqlite")
    join(store)
    ((pages,),) = store.db.rows("PRAGMA page_count")
    at_most(store, pages)
    for _ in range(2):
        with pytest.raises(DiskFull, match=r"no room to write coordinator\.sqlite \(.* full"):
            join(store, 100_000)
    errors: list[OurFault] = []

    def attempt() -> None:
        try:
            join(store, 100_000)
        except OurFault as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert [type(error) for error in errors] == [DiskFull] * 8
    assert len(store.members.devices()) == 1
    at_most(store, 1_000_000)
    join(store, 100_000)
    assert len(store.members.devices()) == 2
    store.close()


def test_a_commit_that_fails_is_nobodys_and_the_next_one_succeeds(tmp_path: Path) -> None:
    store = Store(tmp_path / "coordinator.sqlite")
    failpoints.arm("device-written@2=EIO")
    join(store)
    with pytest.raises(InternalError, match=r"disk fails at coordinator\.sqlite \(Input/output error\)"):
        join(store)
    join(store)
    assert len(store.members.devices()) == 2
    store.close()


def test_an_upload_whose_fsync_failed_is_sent_again(tmp_path: Path) -> None:
    """What the disk did not take may be in memory still, where it would look whole."""
    blobs, digest = Blobs(tmp_path), hashlib.sha256(b"test content").hexdigest()
    blobs.append("a", 0, b"test content", 100)
    failpoints.arm("blob-written@1=EIO")
    with pytest.raises(InternalError, match=r"uploads/a\.part"):
        blobs.finish("a", digest)
    assert blobs.offset("a") == 0
    blobs.append("a", 0, b"test content", 100)
    assert blobs.finish("a", digest).read_bytes() == b"test content"


def test_a_point_acts_at_its_times_alone() -> None:
    failpoints.arm("blob-renamed@2-3=EIO, cache-written=ENOSPC")
    failpoints.reach("blob-renamed")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            failpoints.reach("blob-renamed")
    failpoints.reach("blob-renamed")
    failpoints.reach("blob-written")
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            failpoints.reach("cache-written")
    failpoints.arm("")
    failpoints.reach("cache-written")


def test_a_fault_is_said_once_a_minute_and_another_at_once(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    trouble = FaultLog(lambda: now[0])
    with caplog.at_level(logging.ERROR):
        for seconds in (0.0, 1.0, 59.0):
            now[0] = seconds
            trouble.log("PATCH an upload", DiskFull(f"no room for upload {seconds}"))
        assert caplog.messages == ["PATCH an upload: no room for upload 0.0"]
        trouble.log("PATCH an upload", InternalError("the disk fails"))
        trouble.log("a tick", DiskFull("no room for a row"))
        now[0] = 61.0
        trouble.log("PATCH an upload", DiskFull("still none"))
    assert caplog.messages[1:] == [
        "PATCH an upload: the disk fails",
        "a tick: no room for a row",
        "PATCH an upload: still none",
    ]


PIECES = st.lists(st.binary(max_size=40), max_size=12)


@given(pieces=PIECES, taken=st.lists(st.integers(1, 50), max_size=6), together=st.booleans())
def test_all_pieces_are_written_however_few_bytes_are_taken_at_a_time(
    pieces: list[bytes], taken: list[int], together: bool
) -> None:
    """A disk that is nearly full takes a part; `together`: the system takes several pieces in one call."""
    takes = iter(taken)

    class Slow(io.FileIO):
        def write(self, bytes: Any, /) -> int:
            return super().write(memoryview(bytes)[: next(takes, None)])

    def writev(descriptor: int, group: Sequence[bytes]) -> int:
        return os.write(descriptor, b"".join(group)[: next(takes, None)])

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if together:
            patch.setattr(os, "writev", writev)
        else:
            patch.delattr(os, "writev")
        patch.setattr(disk, "MOST_PIECES", 3)
        with Slow(Path(folder, "file"), "ab") as file:
            write_all(file, pieces)
        assert Path(folder, "file").read_bytes() == b"".join(pieces)


def test_more_pieces_than_one_call_takes(tmp_path: Path) -> None:
    pieces = [bytes([number % 251]) for number in range(5000)]
    with io.FileIO(tmp_path / "file", "ab") as file:
        write_all(file, pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_a_file_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    class Stuck(io.FileIO):
        def write(self, bytes: Any, /) -> int:
            return 0

    with Stuck(tmp_path / "file", "ab") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", lambda descriptor, group: 0)
        with pytest.raises(OSError, match="nothing was written"):
            write_all(file, [b"x"])
