"""`edge-coordinator audit`: what was noted of who came, who tried to, and what the host did."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from coordinator.upkeep.data_folder import open_existing
from edge_sdk.core.errors import InputError
from edge_sdk.core.records import to_json
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import say, say_text


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    audit = commands.add_parser("audit", help="show the audit log: joins, wrong tokens, refusals, your acts")
    audit.add_argument("--data", type=Path, required=True)
    audit.add_argument("--last", type=int, default=50, help="entries (default %(default)s)")
    audit.add_argument("--json", action="store_true", help="for machines: one entry a line")
    audit.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the newest entries, the oldest of them first."""
    if options.last < 1:
        raise InputError(f"--last {options.last} must be 1 or more")
    store, _ = open_existing(options.data)
    for entry in store.members.audit(options.last):
        if options.json:
            say_text(json.dumps(to_json(entry)) + "\n")
            continue
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
        times = f" ×{entry.times}" if entry.times > 1 else ""
        who = " ".join(part for part in (entry.device, entry.address) if part)
        say(f"{at}  {entry.what}{times}  {who}  {printable(entry.detail, 120)}".rstrip())
    return 0
