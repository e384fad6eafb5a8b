"""A data folder taken up at a start: what it holds, and what the engine is told of it."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path

from coordinator.engine import pacing
from coordinator.engine.events import Buffered, Lease, Restarted
from coordinator.engine.state import Ration
from coordinator.privacy import ledger
from coordinator.privacy.mechanism import Privacy
from coordinator.settings import Settings
from coordinator.storage.blobs import Blobs
from coordinator.storage.rows import Run, StoredUpdate
from coordinator.storage.store import DATABASE, Store
from coordinator.upkeep import folder_file
from coordinator.upkeep.collection import Collector
from coordinator.upkeep.data_folder import (
    OURS,
    federation_of,
    host_token,
    join_token,
    require_new,
    require_sound,
)
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Assignment, Federation
from edge_sdk.core.records import encode, to_json
from edge_sdk.system.durable import make_folder, make_private
from edge_sdk.system.terminal import logger

log = logger("coordinator")


@dataclass(frozen=True)
class Opened:
    """A data folder that a coordinator can go on from."""

    federation: Federation
    store: Store
    blobs: Blobs
    collector: Collector
    run: Run
    ration: Ration | None  # None without differential privacy


def open_folder(folder: Path, settings: Settings) -> Opened:
    """Open or begin the federation of a data folder, check it, and clear away what a kill left half done.

    Raises:
        InputError: the folder cannot be used, is damaged, or holds another federation than the settings
            describe; one line that says what to do.
    """
    try:
        make_folder(folder)
        if mended := make_private(folder, OURS):
            log.warning("%s", mended)
        blobs = Blobs(folder)
    except OSError as error:
        raise InputError(f"{folder}: no usable data folder ({error.strerror}); name another") from error
    database = folder / DATABASE
    if not database.exists() or not database.stat().st_size:
        require_new(folder)
    said = folder_file.read(folder)
    store = Store(database)
    federation = _fixed_federation(store, settings, folder)
    folder_file.require_accounted(folder, said, store, federation.id)
    ledger.open_ledger(store, settings.privacy, folder)
    collector = Collector(store, blobs, settings.storage.keep_versions, settings.policy.staleness_limit)
    require_sound(folder, store, blobs, collector.newest)
    collector.tidy()
    host_token(folder), join_token(folder)
    _leave_out_unreadable(store)
    ration = _restored_ration(store, settings.privacy)
    run = folder_file.begin_run(folder, store, federation.id)
    return Opened(federation, store, blobs, collector, run, ration)


def _leave_out_unreadable(store: Store) -> None:
    """An update whose record is damaged costs its own device, as one whose file is, and nobody else."""
    unreadable = store.unreadable_updates()
    for id, reason in unreadable.items():
        log.error("update %s is left out: %s", id, reason)
    if unreadable:
        store.reject_updates(unreadable)


def _fixed_federation(store: Store, settings: Settings, folder: Path) -> Federation:
    """The federation of this folder; settings that contradict it are refused by name.

    What the host may change between starts, the time of a lease, is as the settings have it now.
    """
    federation = federation_of(store, folder)
    if federation is None:
        require_new(folder)
        made = settings.build(secrets.token_hex(8))
        store.set_meta("federation", encode(made).decode())
        return made
    if settings.federation.rule == federation.rule and settings.carries != federation.carries:
        raise InputError(
            f"{folder}: rule {federation.rule} {_holding(settings.carries)}, but this federation began with "
            f"one of that name which {_holding(federation.carries)}; restore that"
        )
    now = settings.build(federation.id, federation)
    wanted, fixed = to_json(now), {field.name for field in dataclasses.fields(Federation) if field.compare}
    for key, value in to_json(federation).items():
        if key in fixed and wanted[key] != value:
            raise InputError(
                f"{folder} holds a federation with another {key}; restore that or use another folder"
            )
    return now


def _holding(carries: bool) -> str:
    return "holds the global adapter frozen" if carries else "trains a part of the global adapter"


def _restored_ration(store: Store, privacy: Privacy | None) -> Ration | None:
    """How often each device may still take part; updates beyond a lowered budget are left out."""
    if privacy is None:
        return None
    ration = ledger.ration(store, privacy)
    over = ledger.over_ration(store, ration)
    for id in over:
        log.warning("update %s is left out: its device has no privacy budget left", id)
    store.reject_updates(dict.fromkeys(over, "its device had no privacy budget left"))
    return ration


# --- what the engine is told: everything that it must know follows from the rows on disk ---


def recalled(store: Store, now: float, clock_time: float) -> Restarted:
    """The federation as the disk has it.

    Args:
        store: of the data folder.
        now: by the engine's clock, which begins anew with every start.
        clock_time: the same moment by the clock that rows are dated with, seconds since 1970.
    """
    newest = store.versions(1)
    return Restarted(
        newest=tuple(store.newest_assignments().items()),
        taken_back=tuple(store.reverts()),
        version=newest[0].version if newest else 0,
        rank=newest[0].rank if newest else 0,
        leases=tuple(
            _lease(device, assignment, now, clock_time - granted_at)
            for device, assignment, granted_at in store.open_assignments()
        ),
        buffer=tuple(buffered(stored) for stored in store.unmerged()),
        contributed=tuple(store.last_contributions().items()),
        paces_s=tuple(store.paces_s(pacing.KEPT).items()),
    )


def _lease(device: str, assignment: Assignment, now: float, elapsed_s: float) -> Lease:
    """A lease with what is left of its time; a clock that was put back in between takes nothing off."""
    elapsed_s = max(0.0, elapsed_s)
    return Lease(
        assignment=assignment.id,
        device=device,
        version=assignment.version,
        rank=assignment.rank,
        expires_at=now + max(0.0, assignment.expires_in_s - elapsed_s),
        carry_rank=assignment.carry_rank,
        steps=assignment.steps,
        granted_at=now - elapsed_s,
    )


def buffered(stored: StoredUpdate) -> Buffered:
    """An update as the engine knows it."""
    return Buffered(stored.id, stored.device, stored.version, stored.update.examples)
