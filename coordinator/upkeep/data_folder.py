"""A data folder at a start: that nobody else works on it, that what it holds is sound, its join token."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from coordinator.storage.blobs import Blobs
from coordinator.storage.failpoints import reach
from coordinator.storage.store import DATABASE, Store
from coordinator.upkeep import folder_file
from coordinator.upkeep.folder_file import FOLDER_FILE
from edge_sdk.core.adapter_file.header import read_header
from edge_sdk.core.errors import EdgeError, InputError, ProtocolError
from edge_sdk.core.messages import Federation
from edge_sdk.core.records import decode
from edge_sdk.system.durable import PRIVATE, Step, make_folder, replacing

TOKEN_FILE, HOST_TOKEN_FILE, LOCK = "join-token", "host-token", "coordinator.lock"
KEY_FILE, CERTIFICATE_FILE = "tls-key.pem", "tls-cert.pem"
_TOKENS, _TLS = (TOKEN_FILE, HOST_TOKEN_FILE), (KEY_FILE, CERTIFICATE_FILE)
_FILES = (DATABASE, FOLDER_FILE, *_TOKENS, *_TLS)  # each with what is written beside it
OURS = (*(f"{dot}{name}*" for name in _FILES for dot in ("", ".")), "blobs", "uploads", "cache", LOCK)


def open_existing(folder: Path) -> tuple[Store, Federation]:
    """The rows of a data folder and its federation, to look at, also while a coordinator runs on it.

    Raises:
        InputError: no federation is there, or its database is damaged or an older one; says how to restore.
    """
    database, left = folder / DATABASE, _left_in(folder)
    if not database.exists():
        held = f", but {left.relative_to(folder)} is: restore the folder from a backup" if left else None
        raise InputError(f"{folder}: no coordinator data here{held or '; give the --data folder of `serve`'}")
    said = folder_file.read(folder)
    store = Store(database, upgrade=False)
    try:
        federation = federation_of(store, folder)
        if federation is None:
            require_new(folder)
            raise InputError(f"{folder}: no federation was started here")
        folder_file.require_accounted(folder, said, store, federation.id)
    except BaseException:
        store.close()
        raise
    return store, federation


def federation_of(store: Store, folder: Path) -> Federation | None:
    """The federation that a store knows of.

    Raises:
        InputError: its record is damaged.
    """
    stored = store.meta("federation")
    try:
        return None if stored is None else decode(Federation, stored)
    except (ValueError, ProtocolError) as error:
        raise InputError(
            f"{folder}: the record of the federation in {DATABASE} is damaged ({error}); restore the folder "
            "from a backup"
        ) from error


def _left_in(folder: Path) -> Path | None:
    """A file that shows that a folder held a federation, whatever its database says."""
    signs = (FOLDER_FILE, "blobs/??/*", "uploads/*.part", TOKEN_FILE, f"{DATABASE}.schema-*.bak")
    return next((found for sign in signs for found in folder.glob(sign)), None)


def require_new(folder: Path) -> None:
    """Refuse to begin a federation where one was: collection would remove every file that its rows needed.

    For a folder whose database is missing, empty, or knows of no federation.

    Raises:
        InputError: there are blobs, uploads, a join token, a copy of the database or what it must account
            for; names one.
    """
    if found := _left_in(folder):
        raise InputError(
            f"{folder} held a federation ({found.relative_to(folder)} is there), but its database "
            f"{DATABASE} is gone or empty; restore the folder from a backup, or name another one to "
            "begin anew"
        )


def require_sound(folder: Path, store: Store, blobs: Blobs, newest: int) -> None:
    """Check the newest version to its last bit, and that others which may be needed are there and whole.

    `newest` versions are kept. An update whose file is damaged costs its own device and nobody else; the
    merge names it.

    Raises:
        InputError: something is damaged or gone; names it.
    """
    for number, version in enumerate(store.needed_versions(newest)):
        if version.collected:
            continue
        path = blobs.path(version.digest)
        wrong = _wrong_with(path)
        if wrong is None and number == 0 and not blobs.is_intact(version.digest):
            wrong = "is damaged (its bytes have another SHA-256)"
        if wrong:
            raise InputError(
                f"{folder}: the file of version {version.version}, {path.relative_to(folder)}, {wrong}; "
                "restore the folder from a backup"
            )


def _wrong_with(path: Path) -> str | None:
    """What a look at the header and the size of an adapter file tells."""
    try:
        header, data_bytes = read_header(path, path.stat().st_size)
        if max(entry["data_offsets"][1] for entry in header.values()) != data_bytes:
            return "is damaged (it is not as long as it says)"
    except FileNotFoundError:
        return "is gone"
    except (OSError, EdgeError, LookupError, TypeError, ValueError) as error:
        return f"is damaged ({error})"
    return None


@contextlib.contextmanager
def only_coordinator(folder: Path) -> Iterator[None]:
    """Hold the lock of a data folder, which is made if it is not there, while the block runs.

    Two coordinators on one folder would each merge the same updates. The system releases the lock when the
    process ends, however that is: a kill leaves none behind.

    Raises:
        InputError: another process holds it, or the folder cannot be one; names it.
    """
    lock = FileLock(folder / LOCK, timeout=0, mode=PRIVATE)
    try:
        make_folder(folder)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder}: a coordinator is running on this folder; stop that one, or name another folder"
        ) from error
    except OSError as error:
        raise InputError(f"{folder}: no usable data folder ({error.strerror}); name another") from error
    try:
        yield
    finally:
        lock.release()


def is_served(folder: Path) -> bool:
    """Whether a coordinator runs on this folder at present."""
    lock = FileLock(folder / LOCK, timeout=0, mode=PRIVATE)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


def join_token(folder: Path) -> str:
    """The token by which devices of this machine join: made at the first start, readable by the host alone.

    Raises:
        InputError: the file can be neither made nor read, or is empty.
    """
    return _token(folder / TOKEN_FILE)


def host_token(folder: Path) -> str:
    """The credential of the host itself, for what only a host may see. Made and kept likewise."""
    return _token(folder / HOST_TOKEN_FILE)


def replace_join_token(folder: Path) -> None:
    """Make the join token void, and another in its place; a coordinator that runs hears of it."""
    write_token(folder / TOKEN_FILE, secrets.token_hex(16))


def _token(path: Path) -> str:
    try:
        if not path.exists():
            write_token(path, secrets.token_hex(16))  # never begins with a dash, as an option would
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the token can be neither made nor read ({error})") from error
    if not token:
        raise InputError(f"{path} is empty; remove it, and another token is made")
    return token


def write_token(path: Path, token: str) -> None:
    """Put it in its place whole and durably: half a token lets nobody in."""
    with replacing(path, at=_writing_token) as file:
        file.write(f"{token}\n".encode())


def _writing_token(step: Step) -> None:
    reach("token-written" if step == "written" else "token-renamed")
