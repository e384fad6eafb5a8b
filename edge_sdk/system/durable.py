"""Files that survive a power cut: replaced as a whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from edge_sdk.core.errors import Unwritable


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` so that a crash at any moment leaves the old content or the new, and nothing else.

    Raises:
        Unwritable: the disk is full, or read-only; the old content is there, and nothing beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # one that a crash left has the mode of its time
        try:
            _write(temporary, data, mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # half a file takes room that is short already
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def move_durably(source: Path, target: Path) -> None:
    """Give a file that was written at leisure its final name, once its bytes are on the disk.

    Raises:
        Unwritable: as `write_durably`.
    """
    try:
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        source.replace(target)
        _flush_folder(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error


def unwritable(path: Path, error: OSError) -> Unwritable:
    """The error for a file that the system would not take."""
    return Unwritable(f"{path} cannot be written ({error.strerror or error}); make room on that disk")


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last. Windows cannot open a folder, and makes renames durable by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
