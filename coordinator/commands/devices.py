"""`edge-coordinator devices`: who takes part; and how a host says yes, not now and no."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.commands.times import ago
from coordinator.storage.members import ABSENT
from coordinator.storage.rows import AuditEntry, Device, Standing
from coordinator.storage.store import Store
from coordinator.upkeep.data_folder import open_existing, replace_join_token
from edge_sdk.core.errors import InputError
from edge_sdk.core.records import to_json
from edge_sdk.core.words import printable
from edge_sdk.system.terminal import say, say_text

# command: from which standings, to which, help
CHANGES: dict[str, tuple[tuple[Standing, ...], Standing, str]] = {
    "approve": (("waiting",), "member", "let a device take part that waits for it"),
    "suspend": (("member", "waiting"), "suspended", "let a device take no part until `resume`"),
    "resume": (("suspended",), "member", "let a suspended device take part again"),
    "revoke": (("member", "waiting", "suspended"), "revoked", "put a device out for good"),
}

_NOUNS = {"waiting": "waiting one", "member": "member", "suspended": "suspended one"}


def add_to(commands: Any) -> None:
    """Add the commands and their flags."""
    listed = commands.add_parser("devices", help="list devices: how they stand and what they gave")
    listed.add_argument("--data", type=Path, required=True)
    listed.add_argument("--json", action="store_true", help="for machines")
    listed.set_defaults(run=run)
    for name, (_, _, what) in CHANGES.items():
        change = commands.add_parser(name, help=what)
        change.add_argument("device", help="its id, the beginning of that, or its name")
        change.add_argument("--data", type=Path, required=True)
        change.set_defaults(run=partial(run_change, name))


def run(options: argparse.Namespace) -> int:
    """List them. Who was heard of when is some seconds old."""
    store, _ = open_existing(options.data)
    devices, now = store.members.devices(), time.time()
    if options.json:
        say_text(json.dumps([to_json(device) for device in devices]) + "\n")
        return 0
    say(f"{'device':<9}{'name':<14}{'is':<10}{'rank':>4}{'merged':>7}{'refused':>8}  {'seen':<11}address")
    for device in devices:
        seen = ago(now - device.seen_at) if device.seen_at else "never"
        counts = f"{device.rank or '-':>4}{device.updates:>7}{device.refused:>8}"
        name = printable(device.name, 13)
        say(f"{device.id[:8]:<9}{name:<14}{device.standing:<10}{counts}  {seen:<11}{device.address}")
        if device.refused_why:
            say(f"{'':<9}refused: {printable(device.refused_why, 62)}")
    return 0


def run_change(command: str, options: argparse.Namespace) -> int:
    """Change how one stands; a coordinator that runs on the folder heeds it within a second."""
    store, _ = open_existing(options.data)
    possible, standing, _ = CHANGES[command]
    device = named(store.members.devices(), options.device, possible)
    members = store.members
    invitation = members.invitation_of(device.id)
    members.set_standing(device.id, standing, f"the host has {_past(command)} its device")
    members.note([AuditEntry(time.time(), _past(command), device.id, detail=device.name)])
    shown = f"{device.id} ({printable(device.name, 80)})"
    if command == "approve" or command == "resume":
        say(f"{shown} takes part")
    elif command == "suspend":
        say(f"{shown} takes no part until `edge-coordinator resume`; what was in no version yet is left out")
    else:
        say(f"{shown} is out for good; what was in no version yet is left out")
        _close_its_way_in(store, options.data, invitation)
    return 0


def _close_its_way_in(store: Store, folder: Path, invitation: str | None) -> None:
    """It cannot come back by the same string; others cannot come by it either."""
    if invitation is None:
        replace_join_token(folder)
        say("it had joined by the join token, which is another one by now; members stay")
    else:
        say(f"with it goes invitation {invitation}, by which it had joined")
    say("versions that it had a part in stay; `edge-coordinator revert` takes them back")


def _past(command: str) -> str:
    return {"approve": "approved", "suspend": "suspended", "resume": "resumed", "revoke": "revoked"}[command]


def named(devices: Sequence[Device], text: str, possible: Sequence[Standing]) -> Device:
    """The one device that is meant.

    Raises:
        InputError: none is, or more than one, or it stands in a way in which this cannot be done.
    """
    exact = [device for device in devices if device.id == text]
    begun = [device for device in devices if len(text) >= 4 and device.id.startswith(text)]
    called = [device for device in devices if device.name == text and device.standing not in ABSENT]
    found = exact or begun or called
    if not found:
        raise InputError(f"no device {text!r} here; `edge-coordinator devices` lists them")
    if len(found) > 1:
        ids = ", ".join(device.id for device in found[:5])
        raise InputError(f"{text!r} may be {ids}; name one by its id")
    if found[0].standing not in possible:
        verb = "has" if found[0].standing == "left" else "is"
        raise InputError(
            f"device {found[0].id} {verb} {found[0].standing}; this is for one that is a "
            f"{' or '.join(_NOUNS[standing] for standing in possible)}"
        )
    return found[0]
