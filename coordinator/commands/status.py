"""`edge-coordinator status`: say what a data folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.privacy import ledger
from coordinator.service.other_runs import worked_elsewhere
from coordinator.storage.members import ABSENT
from coordinator.upkeep.data_folder import open_existing
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import say

SHOWN_VERSIONS = 5


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    status = commands.add_parser("status", help="say what a data folder holds")
    status.add_argument("--data", type=Path, required=True)
    status.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Say it."""
    store, federation = open_existing(options.data)
    versions = store.versions(SHOWN_VERSIONS)
    say(f"federation  {federation.id}  ({federation.base.model}, rule {federation.rule})")
    say(f"version     {versions[0].version if versions else '0 (nothing merged yet)'}")
    say(f"buffered    {len(store.unmerged())} updates")
    if chosen := ledger.choices(store):
        say(f"privacy     {ledger.worst(store, chosen.delta)}")
    else:
        say(f"clipped     {store.clipped()} updates")
    for id, run in store.elsewhere():
        say(f"device {id} {worked_elsewhere(run)}")
    say(f"{'device':<24}{'rank':>6}{'merged':>8}{'staleness':>11}{'refused':>9}")
    for device in store.members.devices():
        if device.standing in ABSENT:
            continue
        shown = f"{device.updates:>8}{device.mean_staleness:>11.2f}{device.refused:>9}"
        say(f"{printable(device.name, 23):<24}{device.rank:>6}{shown}")
    if versions:
        say(f"{'version':<24}{'rank':>6}{'updates':>8}{'dropped':>11}  (rank cap {federation.rank_cap})")
    for version in versions:
        merged = store.merged_updates(version.version)
        number = str(version.version)
        if version.reverts_to is not None:
            number += f" (as {version.reverts_to} was)"
        say(f"{number:<24}{version.rank:>6}{merged:>8}{version.discarded_share:>11.2%}")
    return 0
