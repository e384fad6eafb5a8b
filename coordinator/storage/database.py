"""A SQLite file: one connection that writes, two that read, and what its disk's faults are called.

Write-ahead log with full synchronous commits: when a transaction is over, it is on disk. What is asked and
written, in SQL, is `store.py`'s; another database would stand here.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from coordinator.storage.disk import blaming, disk_error
from coordinator.storage.failpoints import Point, reach
from coordinator.storage.group_commit import GroupCommit
from coordinator.storage.schema import MIGRATIONS, migrate, schema_of
from edge_sdk.core.errors import DiskFull, InputError
from edge_sdk.system.durable import create

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Contradiction(Exception):
    """A transaction would break a rule of the schema, or one between rows; nothing of it is there."""


class Database:
    """One file. Any thread may use it; the one that opened it, an event loop's, never waits to read.

    Args:
        path: where it lies; made where it is missing.
        upgrade: bring an older schema up to date, which only the holder of the folder's lock may.

    Raises:
        InputError: it cannot be used, is damaged or another program's, or has a newer schema; one line that
            says what to do. Nothing of it was changed.
    """

    def __init__(self, path: Path, upgrade: bool = True) -> None:
        self._path, self._home = path, threading.get_ident()
        with _refusing(path):
            self._commits = GroupCommit(_opened(path, upgrade))
            self._own_reader, self._reader = _Reader(path), _Reader(path)

    @contextmanager
    def transaction(self, written: Point, committed: Point) -> Iterator[sqlite3.Connection]:
        """All or nothing, on disk at the end. The points are reached before and after the commit.

        Raises:
            Contradiction: a rule of the schema would be broken.
            DiskFull, InternalError: the disk is full, read-only or fails.
        """
        try:
            with self._blaming():
                with self._commits.transaction() as db:
                    yield db
                    reach(written)
                reach(committed)
        except sqlite3.IntegrityError as error:
            raise Contradiction(str(error)) from error

    def rows(self, query: str, *values: Any) -> list[Any]:
        """What is committed: the answer to one query.

        Raises:
            DiskFull, InternalError: the disk is full, read-only or fails.
        """
        reader = self._own_reader if threading.get_ident() == self._home else self._reader
        with self._blaming():
            return reader.rows(query, values)

    def data_version(self) -> int:
        """A number that changes when another process has written here."""
        return self._commits.data_version()

    def close(self) -> None:
        """Fold the log into the file and let go of it."""
        self._own_reader.close()
        self._reader.close()
        self._commits.close()

    def _blaming(self) -> AbstractContextManager[None]:
        """Name the database where its disk fails; a broken rule of the schema is another matter."""
        return blaming(self._path.name, self._path.parent)


class _Reader:
    """A connection that sees what is committed, for one query at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA query_only = ON")

    def rows(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say in one line why a database cannot be opened, and what to do."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        if isinstance(disk_error(path.name, error, path.parent), DiskFull):
            raise InputError(f"{path}: the disk is full ({error}); make room and start again") from error
        damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
        what_to_do = "; restore the folder from a backup" if damaged else ""
        raise InputError(f"{path}: not a usable coordinator database ({error}){what_to_do}") from error


def _opened(path: Path, upgrade: bool) -> sqlite3.Connection:
    """A connection that may write; the file is looked at before anything of it is changed."""
    if not path.exists():
        create(path).close()  # the files that SQLite puts beside it have the same mode
    logged = path.with_name(f"{path.name}-wal").exists()  # pages that a crash kept from coming here
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        _require_whole(db, path, logged)
        have = schema_of(db, path)
        if not upgrade and have < len(MIGRATIONS):
            raise InputError(
                f"{path}: schema {have} is older than this program's {len(MIGRATIONS)}; the next "
                "`edge-coordinator serve` on this folder brings it up to date"
                if have
                else f"{path} is empty; restore the folder from a backup"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        if upgrade:
            migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _require_whole(db: sqlite3.Connection, path: Path, logged: bool) -> None:
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    (page_bytes,) = db.execute("PRAGMA page_size").fetchone()
    if not logged and path.stat().st_size % page_bytes:  # what is missing of a page is taken for zeros
        found = "its last page is cut short"
    if found != "ok":
        reason = " ".join(str(found).split())
        raise InputError(f"{path} is damaged ({reason}); restore the folder from a backup")
