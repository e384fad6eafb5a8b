"""What a data folder must hold before a coordinator goes on from it: told at the start, not at a merge."""

from __future__ import annotations

from pathlib import Path

from coordinator.storage.blobs import Blobs
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file.header import read_header
from edge_sdk.core.errors import EdgeError, InputError


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
