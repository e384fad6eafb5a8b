"""`edge-coordinator invite` and its like: strings by which devices join, made, listed and deleted."""

from __future__ import annotations

import argparse
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coordinator.commands.times import ago, within
from coordinator.service.door import hash_of
from coordinator.storage.rows import AuditEntry, Invitation
from coordinator.storage.store import Store
from coordinator.upkeep.announcement import Announcement, announced
from coordinator.upkeep.data_folder import open_existing
from edge_sdk.core.addresses import is_local, normal_address
from edge_sdk.core.errors import InputError
from edge_sdk.core.records import to_json
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import say, say_text

UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86400.0}
MOST_S = 3660 * UNITS_S["d"]


def add_to(commands: Any) -> None:
    """Add the commands and their flags."""
    invite = commands.add_parser("invite", help="print a string by which devices join, with all they need")
    invite.add_argument("--data", type=Path, required=True)
    invite.add_argument("--uses", type=int, default=1, help="devices that may join by it (default 1; 0: any)")
    invite.add_argument("--expires", default="24h", metavar="TIME", help="e.g. 30m, 24h, 7d (default 24h)")
    invite.add_argument("--description", default="", help="what it is for, in your words")
    invite.add_argument("--url", help="address that devices can reach (default: what `serve` announced)")
    invite.add_argument("--json", action="store_true", help="for machines")
    invite.set_defaults(run=run)

    listed = commands.add_parser("invitations", help="list invitations; their strings are shown once only")
    listed.add_argument("--data", type=Path, required=True)
    listed.add_argument("--json", action="store_true", help="for machines")
    listed.set_defaults(run=run_list)

    delete = commands.add_parser("uninvite", help="delete an invitation; who joined by it stays")
    delete.add_argument("id", help="as `invitations` shows it")
    delete.add_argument("--data", type=Path, required=True)
    delete.set_defaults(run=run_delete)


def run(options: argparse.Namespace) -> int:
    """Make one, and print it this once."""
    store, _ = open_existing(options.data)
    if options.uses < 0:
        raise InputError(f"--uses {options.uses} must be 1 or more, or 0 for any number")
    lasts_s, token, now = duration_s(options.expires), secrets.token_hex(16), time.time()
    known = announced(store, options.data) if options.url is None else _at(options, store)
    string = str(known.invitation(token))
    made = Invitation(
        secrets.token_hex(4), printable(options.description, 80), now, now + lasts_s, options.uses or None
    )
    store.members.invite(made, hash_of(token))
    store.members.note([AuditEntry(now, "invited", detail=f"invitation {made.id}: {made.description}")])
    if options.json:
        say_text(json.dumps(to_json(made) | {"invitation": string}) + "\n")
        return 0
    uses = "any number of devices" if made.uses is None else f"{made.uses} device{'s'[: made.uses > 1]}"
    say(f"invitation {made.id}, by which {uses} may join within {within(lasts_s)}; there:")
    say(f"  {known.command(token)}")
    return 0


def _at(options: argparse.Namespace, store: Store) -> Announcement:
    """What `serve` announced, at the address that the host names."""
    try:
        pin = announced(store, options.data).pin
    except InputError:
        pin = ""
    address = normal_address(options.url)
    is_tls = address.startswith("https:")
    return Announcement(
        address, pin if is_tls else "", insecure=not is_tls and not is_local(urlsplit(address).hostname or "")
    )


def run_list(options: argparse.Namespace) -> int:
    """List them."""
    store, _ = open_existing(options.data)
    found, now = store.members.invitations(), time.time()
    if options.json:
        say_text(json.dumps([to_json(one) for one in found]) + "\n")
        return 0
    if not found:
        say("no invitations; `edge-coordinator invite` makes one")
        return 0
    say(f"{'invitation':<12}{'used':>9}  {'made':<14}{'expires':<14}description")
    for one in found:
        used = f"{one.used}/{'any' if one.uses is None else one.uses}"
        left_s = one.expires_at - now
        ends = f"in {within(left_s)}" if left_s > 0 else "is over"
        say(f"{one.id:<12}{used:>9}  {ago(now - one.made_at):<14}{ends:<14}{one.description}")
    return 0


def run_delete(options: argparse.Namespace) -> int:
    """Delete one."""
    store, _ = open_existing(options.data)
    if not store.members.uninvite(options.id):
        raise InputError(f"no invitation {options.id!r} here; `edge-coordinator invitations` lists them")
    store.members.note([AuditEntry(time.time(), "invitation deleted", detail=f"invitation {options.id}")])
    say(f"invitation {options.id} lets nobody in any more; who joined by it stays")
    return 0


def duration_s(text: str) -> float:
    """Seconds of a duration such as 30m, 24h or 7d.

    Raises:
        InputError: it is none, or none that is of use.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    seconds = int(found[1]) * UNITS_S[found[2]] if found else 0.0
    if not 0 < seconds <= MOST_S:
        raise InputError(f"--expires {text!r} is no time; write it like 30m, 24h or 7d, up to ten years")
    return seconds
