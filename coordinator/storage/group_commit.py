"""Transactions of several threads in one commit: the disk is waited for once, and nobody goes on before it.

A commit waits for the disk. While one thread works in a transaction, others queue up for theirs; each of them
goes on in the same transaction behind a savepoint of its own, and the last of the queue commits for all. A
thread that is alone commits at once, so that nothing ever waits for company.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MOST = 64  # transactions in a commit: the first of them waits for all others


class _Group:
    """The transactions of one commit, and how that went."""

    def __init__(self) -> None:
        self.size = 0
        self.over = threading.Event()
        self.error: BaseException | None = None


class GroupCommit:
    """The writing side of one connection, which must be used through this alone."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._waiting = 0  # threads that want a turn
        self._group: _Group | None = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on disk at the end. What the block raises undoes this block alone.

        Raises:
            sqlite3.Error: the commit failed; nothing of any transaction in it is there.
        """
        with self._count:
            self._waiting += 1
        with self._turn:
            with self._count:
                self._waiting -= 1
            group, cause = self._joined(), None
            try:
                yield from self._one()
            except BaseException as error:
                cause = error
                raise
            finally:
                if not self._db.in_transaction:  # a full disk ends all of it, also what others did before
                    self._end(group, cause)
                elif not self._waiting or group.size >= MOST:
                    self._commit(group)
        group.over.wait()
        if group.error is not None:
            raise group.error

    def data_version(self) -> int:
        """A number that changes when another connection has committed."""
        with self._turn:
            (number,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(number)

    def close(self) -> None:
        """Close the connection, after the transaction in hand."""
        with self._turn:
            self._db.close()

    def _joined(self) -> _Group:
        """The group whose transaction is open; a new one if none is."""
        if self._group is None:
            if self._db.in_transaction:  # where even the end of the last one failed with the disk
                self._db.execute("ROLLBACK")
            self._db.execute("BEGIN IMMEDIATE")
            self._group = _Group()
        self._group.size += 1
        return self._group

    def _one(self) -> Iterator[sqlite3.Connection]:
        """One transaction within the open one."""
        self._db.execute("SAVEPOINT one")
        try:
            yield self._db
        except BaseException:
            with suppress(sqlite3.Error):  # likewise; then there is no transaction any more
                self._db.execute("ROLLBACK TO one")
                self._db.execute("RELEASE one")
            raise
        self._db.execute("RELEASE one")

    def _commit(self, group: _Group) -> None:
        error: BaseException | None = None
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as failed:
            error = failed
            with suppress(sqlite3.Error):  # a full disk ends it by itself; the next one tries again
                self._db.execute("ROLLBACK")
        self._end(group, error)

    def _end(self, group: _Group, error: BaseException | None) -> None:
        self._group = None
        group.error = error
        group.over.set()
