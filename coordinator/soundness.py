"""What a data folder must hold before a coordinator goes on from it: told at the start, not at a merge."""

from __future__ import annotations

from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.store import Store
from edge_sdk.core.codec import open_own
from edge_sdk.core.errors import EdgeError, InputError


def require_sound(folder: Path, store: Store, blobs: Blobs, newest: int, scaling: float) -> None:
    """Check the database, the newest version to its last bit, and that others which may be needed open.

    `newest` versions are kept; `scaling` is the federation's. An update whose file is damaged costs its own
    device and nobody else; the merge names it.

    Raises:
        InputError: something is damaged or gone; names it.
    """
    if (damage := store.damage()) is not None:
        raise InputError(f"{folder}: the database is damaged ({damage}); restore the folder from a backup")
    for version in store.needed_versions(newest):
        if version.collected:
            continue
        path = blobs.path(version.digest)
        try:
            open_own(path, scaling)
            wrong = None
        except FileNotFoundError:
            wrong = "is gone"
        except (OSError, EdgeError) as error:
            wrong = f"is damaged ({error})"
        if wrong is None and version == store.versions(1)[0] and not blobs.is_intact(version.digest):
            wrong = "is damaged (its bytes have another SHA-256)"
        if wrong:
            raise InputError(
                f"{folder}: the file of version {version.version}, {path.relative_to(folder)}, {wrong}; "
                "restore the folder from a backup"
            )
