"""`folder.json`: what the database of a data folder must account for: its federation, last run and version.

A database that is put back by itself, without the files beside it, is older than they are: it would let the
collector remove what its newer rows needed, and hand numbers of versions out twice. So each start and each
version is written here as well, durably and after the database: after a crash in between this file is behind,
never ahead. A backup carries one that agrees with its rows.
"""

from __future__ import annotations

import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from coordinator.storage.disk import blaming
from coordinator.storage.failpoints import reach
from coordinator.storage.rows import Run
from coordinator.storage.store import DATABASE, Store
from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.records import decode, encode
from edge_sdk.core.words import printable
from edge_sdk.system.durable import Step, replacing
from edge_sdk.system.terminal import logger

log = logger("coordinator")
FOLDER_FILE = "folder.json"
_RESTORE = "restore the whole folder from a backup, never the database alone"


@dataclass(frozen=True)
class FolderFile:
    """What the file says. `run`: the name of the last one, as `Run.name`."""

    federation: str
    run: str
    version: int


def read(folder: Path) -> FolderFile | None:
    """The file of a data folder; None in one that was last used before there were such files.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    path = folder / FOLDER_FILE
    try:
        return decode(FolderFile, path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ProtocolError) as error:
        raise InputError(
            f"{path} is damaged ({error}); restore the folder from a backup, or, where nothing but this file "
            "was lost, remove it: the next start makes another"
        ) from error


def write(folder: Path, said: FolderFile) -> None:
    """Put the file in its place whole and durably.

    Raises:
        DiskFull, InternalError: the disk does not take it; the one before is there.
    """
    with blaming(FOLDER_FILE), replacing(folder / FOLDER_FILE, at=_writing) as file:
        file.write(encode(said, indent=1) + b"\n")


def _writing(step: Step) -> None:
    reach("folder-file-written" if step == "written" else "folder-file-renamed")


def agreeing_with(store: Store, federation: str) -> FolderFile | None:
    """What the rows of a store say; None where they know of no run."""
    run = store.newest_run()
    return FolderFile(federation, run.name, _newest(store)) if run else None


def require_accounted(folder: Path, said: FolderFile | None, store: Store, federation: str) -> None:
    """Refuse a database that is not the one, or not the newest one, of its folder.

    Args:
        folder: the data folder.
        said: its file, read before the database: a coordinator that runs writes to both.
        store: its database.
        federation: the id of the federation in that.

    Raises:
        InputError: says what the database lacks, and how to restore.
    """
    if said is None:
        return
    if said.federation != federation:
        raise InputError(
            f"{folder}: {DATABASE} is of federation {federation}, the folder of {said.federation} "
            f"({FOLDER_FILE}); {_RESTORE}"
        )
    newest = _newest(store)
    if newest < said.version:
        raise InputError(
            f"{folder}: {DATABASE} ends at version {newest}, but version {said.version} was published here "
            f"({FOLDER_FILE}); {_RESTORE}"
        )
    if said.run not in store.run_names():
        raise InputError(
            f"{folder}: {DATABASE} does not know run {said.run} of this folder ({FOLDER_FILE}), so it is an "
            f"older one or another's; {_RESTORE}"
        )


def _newest(store: Store) -> int:
    version = store.newest()
    return version.version if version else 0


def begin_run(folder: Path, store: Store, federation: str) -> Run:
    """Count this start in the database and the file; say so where the folder has moved since the last one.

    Raises:
        DiskFull, InternalError: the disk does not take it.
    """
    before, place = store.newest_run(), _place(folder)
    if before and before.place != place:
        log.warning(
            "this folder was at %s when it last ran, and is at %s now; if a coordinator still runs there, "
            "stop one of the two",
            before.place,
            place,
        )
    run = store.begin_run(secrets.token_hex(4), place, time.time())
    write(folder, FolderFile(federation, run.name, _newest(store)))
    return run


def note_version(folder: Path, federation: str, run: Run, version: int) -> None:
    """Have the file say that this version was published, once the database does.

    Raises:
        DiskFull, InternalError: the disk does not take it; the file is behind until the next version.
    """
    write(folder, FolderFile(federation, run.name, version))


def _place(folder: Path) -> str:
    """Which folder on which machine this is: a copy has another inode, if nothing else."""
    found = f"{platform.node()}:{folder.resolve()} (inode {folder.stat().st_ino})"
    return printable(found, 1000)
