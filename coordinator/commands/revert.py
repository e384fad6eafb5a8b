"""`edge-coordinator revert`: go back to the content of an older version."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.service.reverting import revert
from coordinator.upkeep.backup import require_finished
from coordinator.upkeep.data_folder import open_existing
from edge_sdk.system.terminal import say


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    back = commands.add_parser("revert", help="go back: a new version with the content of an older one")
    back.add_argument("--data", type=Path, required=True)
    back.add_argument("--to", type=int, required=True, metavar="VERSION", help="0: as if nothing was learnt")
    back.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make that version, or have the coordinator that runs make it."""
    require_finished(options.data)
    store, federation = open_existing(options.data)
    made = revert(options.data, store, federation, options.to)
    say(
        f"version {made.version} is what version {options.to} was; "
        "work that began from versions in between is left out"
    )
    return 0
