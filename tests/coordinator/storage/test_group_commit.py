"""Several threads, one commit: each transaction all or nothing, and on disk when its thread goes on."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.storage.group_commit import GroupCommit

THREADS = 24


class Counted(sqlite3.Connection):
    """A connection that counts its commits, may refuse them, and lets others queue up before the first."""

    commits = 0
    refuse = False

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:  # type: ignore[override]
        if sql == "COMMIT":
            self.commits += 1
            if self.refuse:
                raise sqlite3.OperationalError("the disk failed")
        return super().execute(sql, *values)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Counted]:
    made = sqlite3.connect(
        tmp_path / "x.sqlite", check_same_thread=False, isolation_level=None, factory=Counted
    )
    made.execute("PRAGMA journal_mode = WAL")
    made.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    yield made
    made.close()


def numbers(tmp_path: Path) -> list[int]:
    """As another connection sees them: what is committed."""
    with contextlib.closing(sqlite3.connect(tmp_path / "x.sqlite")) as other:
        return [n for (n,) in other.execute("SELECT n FROM numbers ORDER BY n")]


def test_alone_it_commits_at_once(db: Counted, tmp_path: Path) -> None:
    commits = GroupCommit(db)
    for n in range(3):
        with commits.transaction() as open_:
            open_.execute("INSERT INTO numbers VALUES (?)", (n,))
        assert numbers(tmp_path) == list(range(n + 1))
    assert db.commits == 3


def together(commits: GroupCommit, tmp_path: Path) -> list[str]:
    """THREADS transactions that queue up behind one; odd ones fail. What each thread saw."""
    first_inside, all_waiting = threading.Event(), threading.Event()
    seen = [""] * THREADS

    def run(n: int) -> None:
        try:
            with commits.transaction() as db:
                if n == 0:
                    first_inside.set()
                    assert all_waiting.wait(30.0)
                db.execute("INSERT INTO numbers VALUES (?)", (n,))
                if n % 2:
                    raise ValueError(n)
        except (ValueError, sqlite3.Error) as error:
            seen[n] = type(error).__name__
        else:
            seen[n] = "there" if n in numbers(tmp_path) else "lost"

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    threads[0].start()
    assert first_inside.wait(30.0)
    for thread in threads[1:]:
        thread.start()
    while commits._waiting < THREADS - 1:
        pass
    all_waiting.set()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    return seen


def test_those_that_wait_share_a_commit_and_fail_alone(db: Counted, tmp_path: Path) -> None:
    seen = together(GroupCommit(db), tmp_path)
    assert seen == ["ValueError" if n % 2 else "there" for n in range(THREADS)]
    assert numbers(tmp_path) == list(range(0, THREADS, 2))
    assert db.commits == 1


def test_a_failed_commit_is_told_to_all_and_leaves_nothing(db: Counted, tmp_path: Path) -> None:
    commits = GroupCommit(db)
    db.refuse = True
    seen = together(commits, tmp_path)
    assert seen == ["ValueError" if n % 2 else "OperationalError" for n in range(THREADS)]
    assert numbers(tmp_path) == []
    db.refuse = False
    with commits.transaction() as open_:  # and the next one works
        open_.execute("INSERT INTO numbers VALUES (7)")
    assert numbers(tmp_path) == [7]


def test_a_full_disk_undoes_the_group_and_is_told_to_all(db: Counted, tmp_path: Path) -> None:
    """SQLite ends the whole transaction by itself then, whatever the savepoints."""
    commits = GroupCommit(db)
    told: list[BaseException] = []

    def early() -> None:
        try:
            with commits.transaction() as open_:
                open_.execute("INSERT INTO numbers VALUES (1)")
                inside.set()
                while commits._waiting < 1:
                    pass
        except sqlite3.Error as error:
            told.append(error)

    inside = threading.Event()
    thread = threading.Thread(target=early)
    thread.start()
    assert inside.wait(30.0)

    def late() -> None:
        with commits.transaction() as open_:
            open_.execute("ROLLBACK")  # as SQLITE_FULL does
            raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(sqlite3.OperationalError, match="full"):
        late()
    thread.join(30.0)
    assert [str(error) for error in told] == ["database or disk is full"]
    assert numbers(tmp_path) == []
