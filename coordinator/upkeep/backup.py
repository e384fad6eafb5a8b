"""A copy of a data folder that a coordinator can go on from, taken while another runs on it.

The rows are copied as they are at one moment, and then the blobs that they need: hard links where the copy is
on the same disk. A blob that went in between, because its update is in a version by now, is needed by no
newer rows: then they are copied again. The rows get their name last, so that a broken-off copy is none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from coordinator.storage.blobs import Blobs
from coordinator.storage.failpoints import reach
from coordinator.storage.schema import write_copy
from coordinator.storage.store import DATABASE, Store
from coordinator.upkeep import folder_file
from coordinator.upkeep.data_folder import (
    CERTIFICATE_FILE,
    KEY_FILE,
    TOKEN_FILE,
    open_existing,
    write_token,
)
from coordinator.upkeep.folder_file import FolderFile
from edge_sdk.core.adapter_file.codec import sha256_file
from edge_sdk.core.errors import InputError
from edge_sdk.system.durable import fsync_file, fsync_folder, make_folder, move_into_place, replacing

_UNFINISHED = f".{DATABASE}-new"
TRIES = 20  # each is a version later than the one before; versions come no faster than blobs are copied


@dataclass(frozen=True)
class Backup:
    """What was copied."""

    version: int
    buffered: int
    files: int

    def __str__(self) -> str:
        return f"version {self.version}, {self.buffered} buffered updates, {self.files} files"


def require_finished(folder: Path) -> None:
    """Raise InputError for a backup that broke off: a new federation would begin in it."""
    if (folder / _UNFINISHED).exists() and not (folder / DATABASE).exists():
        raise InputError(f"{folder}: this backup broke off and is not whole; restore another one")


def back_up(data: Path, out: Path) -> Backup:
    """Copy the data folder `data` to `out`, durably. Every update acknowledged before the call is in it.

    Raises:
        InputError: `data` is none, or damaged; `out` is not empty, or cannot be written.
    """
    store, federation = open_existing(data)
    store.close()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is there and not empty; name a new folder for the backup")
        make_folder(out)
        return _back_up(data, out, federation.id)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{out}: the backup failed ({error}); remove it and try again") from error


def _back_up(data: Path, out: Path, federation: str) -> Backup:
    rows, source, copies = out / _UNFINISHED, Blobs(data), Blobs(out)
    gone: set[str] = set()
    for _ in range(TRIES):
        with contextlib.closing(sqlite3.connect(data / DATABASE)) as db:
            write_copy(db, rows)
        reach("backup-rows")
        made, needed, said = _read(rows, federation)
        lost = gone & needed
        if lost:
            raise InputError(
                f"{data}: blob {min(lost)} is needed and not there; restore the folder from an older backup"
            )
        gone = {digest for digest in sorted(needed) if not _copied(source, copies, digest)}
        if not gone:
            break
    else:
        raise InputError(f"{data}: versions came faster than their blobs could be copied; try again")
    for digest in set(copies.digests()) - needed:
        copies.path(digest).unlink()
    if said:
        folder_file.write(out, said)
    write_token(out / TOKEN_FILE, (data / TOKEN_FILE).read_text().strip())
    for name in (
        KEY_FILE,
        CERTIFICATE_FILE,
    ):  # without the key, devices would not know a restored coordinator
        if (data / name).exists():
            with replacing(out / name) as file:
                file.write((data / name).read_bytes())
    for folder in (out / "blobs", *(out / "blobs").iterdir()):
        fsync_folder(folder)
    reach("backup-ready")
    move_into_place(rows, out / DATABASE)  # durably once more: reading it has changed its header
    fsync_folder(out.parent)
    return made


def _read(rows: Path, federation: str) -> tuple[Backup, set[str], FolderFile | None]:
    """What a copy of the rows says, the digests of the blobs that it needs, and the file beside it."""
    store = Store(rows, upgrade=False)
    try:
        needed, versions = store.needed_digests(), store.versions(1)
        buffered, said = len(store.unmerged()), folder_file.agreeing_with(store, federation)
    finally:
        store.close()
    return Backup(versions[0].version if versions else 0, buffered, len(needed)), needed, said


def _copied(source: Blobs, copies: Blobs, digest: str) -> bool:
    """Copy one blob, whole and durably; False if it is not there.

    Raises:
        InputError: its bytes are not those of its digest.
    """
    target = copies.path(digest)
    if target.exists():
        return True
    make_folder(target.parent)
    temporary = target.with_name(f".{digest}-new")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source.path(digest), temporary)
        except FileNotFoundError:
            raise
        except OSError:  # on another disk, or one without links
            shutil.copyfile(source.path(digest), temporary)
            fsync_file(temporary)
    except FileNotFoundError:
        return False
    if sha256_file(temporary) != digest:
        raise InputError(
            f"blob {digest} is damaged: if it is of an update, the next merge leaves that out, and a backup "
            "after it succeeds; if of a version, restore the folder from an older backup"
        )
    temporary.replace(target)
    reach("backup-blob")
    return True
