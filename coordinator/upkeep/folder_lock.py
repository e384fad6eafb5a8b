"""One coordinator on one data folder: two would each merge the same updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from edge_sdk.core.errors import InputError


@contextlib.contextmanager
def only_coordinator(folder: Path) -> Iterator[None]:
    """Hold the lock of a data folder, which is made if it is not there, while the block runs.

    The system lets go of it when the process ends, however that is: a kill leaves no lock behind.

    Raises:
        InputError: another process holds it, or the folder cannot be one; names it.
    """
    lock = FileLock(folder / "coordinator.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
