"""`edge-coordinator backup`: copy a data folder, also while a coordinator runs on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.upkeep.backup import back_up
from edge_sdk.system.terminal import say


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    backup = commands.add_parser("backup", help="copy a data folder, also while a coordinator runs on it")
    backup.add_argument("--data", type=Path, required=True)
    backup.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there")
    backup.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Copy it."""
    made = back_up(options.data, options.out)
    say(f"{made} copied to {options.out}; `serve --data {options.out}` goes on from there")
    return 0
