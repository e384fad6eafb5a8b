"""Going back to an older version, at the host's word: by the coordinator that runs, or here if none does."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from coordinator.engine.events import Revert
from coordinator.merging.merger import Merger
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import Version
from coordinator.storage.store import Store
from coordinator.upkeep import folder_file
from coordinator.upkeep.data_folder import is_served, only_coordinator
from edge_sdk.core.errors import InputError, OurFault
from edge_sdk.core.messages import Federation

PATIENCE_S = 120.0  # a merge that is under way is done first
POLL_S = 0.1


def revert(folder: Path, store: Store, federation: Federation, to: int) -> Version:
    """Make a version with the content of version `to`, and leave out what was trained from those in between.

    Work that is under way from one of them is given up, and updates that wait for a version are dropped.
    Devices and their credentials stay.

    Returns:
        The new version, which is on disk.

    Raises:
        InputError: there is no such version, its file is gone or damaged, or the coordinator that runs on
            the folder does not do it.
    """
    newest = _require_possible(folder, store, to)
    if not is_served(folder):
        with only_coordinator(folder):
            version = Merger(federation, store, Blobs(folder)).revert(Revert(newest.version + 1, to))
            if said := folder_file.agreeing_with(store, federation.id):
                with contextlib.suppress(OurFault):  # it is on disk; the next start makes the file follow
                    folder_file.write(folder, said)
            return version
    store.want_revert(to)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        wanted = store.wanted_revert()  # asked first: the wish goes when the version comes
        for found, number in store.reverts():
            if found == to and number > newest.version and (made := store.version(number)):
                return made
        if wanted is None:
            raise InputError(f"{folder}: the coordinator could not go back to version {to}; its log says why")
        time.sleep(POLL_S)
    raise InputError(f"{folder}: the coordinator has not gone back to version {to} yet; it still will")


def _require_possible(folder: Path, store: Store, to: int) -> Version:
    """The newest version, if one may go back from it to version `to`."""
    newest = store.newest()
    if newest is None:
        raise InputError(f"{folder}: no version has been published yet; there is nothing to go back from")
    if not 0 <= to < newest.version:
        raise InputError(f"--to {to}: the newest version is {newest.version}; name an older one, 0 or more")
    if to == 0:
        return newest
    wanted = store.version(to)
    if wanted is None or wanted.collected:
        kept = [str(known.version) for known in store.versions(newest.version)[1:] if not known.collected]
        raise InputError(f"--to {to} was collected; there are {', '.join(['0', *reversed(kept)])}")
    if not Blobs(folder).is_intact(wanted.digest):
        raise InputError(f"--to {to}: the file of that version is damaged or gone; name another one")
    return newest
