"""A disk that is full, read-only or failing: what it is called. And writing many pieces at once."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from edge_sdk.core.errors import DiskFull, InternalError

MOST_PIECES = 1024  # of one call; POSIX promises 16, Linux, macOS and BSD take 1024
_LEAST_ROOM_BYTES = 64 << 10  # below this SQLite cannot begin to work
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Of SQLite's errors those that a disk causes; others are bugs, and stay what they are.
_SQLITE_FULL = sqlite3.SQLITE_FULL
_SQLITE_OF_THE_DISK = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_READONLY,
}


def disk_error(
    file: str, error: OSError | sqlite3.Error, folder: Path | None = None
) -> DiskFull | InternalError | None:
    """What to tell a device of this, or None where no disk is to blame. `file`: what was used, most likely.

    `folder`: where it lies. SQLite has other words than "full" for the room that its shared memory needs.

    Returns:
        DiskFull: there is no room.
        InternalError: the disk is read-only, or fails in another way.
    """
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
        if code != _SQLITE_FULL and code not in _SQLITE_OF_THE_DISK:
            return None
        no_room = folder is not None and shutil.disk_usage(folder).free < _LEAST_ROOM_BYTES
        full, reason = code == _SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and no_room), str(error)
    else:
        full, reason = error.errno in _FULL, error.strerror or str(error)
        if isinstance(error.filename, str | Path):  # the very file, where the system says which
            file = "/".join(Path(error.filename).parts[-2:])
    if full:
        return DiskFull(
            f"the coordinator has no room to write {file} ({reason}); its host must make some; nothing is "
            "lost"
        )
    return InternalError(
        f"the coordinator's disk fails at {file} ({reason}); its host must mend that; nothing is lost"
    )


@contextlib.contextmanager
def blaming(file: str, folder: Path | None = None) -> Iterator[None]:
    """Raise what goes wrong with the disk in this block as `disk_error` has it; other errors as they are."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        found = disk_error(file, error, folder)
        if found is None:
            raise
        raise found from error


def write_all(file: FileIO, pieces: Sequence[bytes]) -> None:
    """Append pieces in as few calls as may be: each call hands the interpreter to another thread and back.

    Raises:
        OSError: some of the bytes may be written.
    """
    if not hasattr(os, "writev"):  # Windows
        for piece in pieces:
            _write(file, memoryview(piece))
        return
    for begin in range(0, len(pieces), MOST_PIECES):
        group = pieces[begin : begin + MOST_PIECES]
        written = os.writev(file.fileno(), group)
        for piece in group:  # all of them, unless a disk has just become full
            if written < len(piece):
                _write(file, memoryview(piece)[written:])
            written = max(0, written - len(piece))


def _write(file: FileIO, rest: memoryview) -> None:
    """Bytes, however few are taken at a time."""
    while rest:
        count = file.write(rest)
        if not count:
            raise OSError(errno.EIO, "nothing was written")
        rest = rest[count:]
