"""`edge-coordinator export`: write the global adapter as a PEFT folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.adapters.serving import export
from coordinator.storage.blobs import Blobs
from coordinator.upkeep.data_folder import open_existing
from edge_sdk.core.errors import InputError
from edge_sdk.system.durable import for_others
from edge_sdk.system.terminal import say


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    take = commands.add_parser("export", help="write the global adapter as a PEFT folder")
    take.add_argument("--data", type=Path, required=True)
    take.add_argument("--out", type=Path, required=True)
    take.add_argument("--version", type=int, help="default: the newest")
    take.add_argument("--rank", type=int, help="default: the live rank of that version")
    take.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write it, after its digest was compared."""
    store, federation = open_existing(options.data)
    versions = store.versions(1)
    if not versions:
        raise InputError(f"{options.data}: no version has been published yet")
    number = versions[0].version if options.version is None else options.version
    version = store.version(number)
    if version is None:
        raise InputError(f"--version {number}: there are 1 to {versions[0].version}")
    if version.collected:
        kept = [known.version for known in store.versions(versions[0].version) if not known.collected]
        raise InputError(f"--version {number} was collected; there are {', '.join(map(str, kept))}")
    rank = options.rank or max(1, version.rank)
    if not 1 <= rank <= federation.rank_cap:
        raise InputError(f"--rank {rank}: this federation keeps 1 to {federation.rank_cap}")
    blobs = Blobs(options.data)
    if not blobs.is_intact(version.digest):
        path = blobs.path(version.digest).relative_to(options.data)
        raise InputError(
            f"{options.data}: the file of version {number}, {path}, is damaged or gone; restore it from a "
            "backup, or export another version"
        )
    with for_others():
        export(federation, number, blobs.path(version.digest), rank, options.out)
    say(f"version {number} at rank {rank} written to {options.out}")
    return 0
