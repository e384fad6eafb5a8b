"""`edge-sdk leave`: give a membership back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_sdk.commands import destination
from edge_sdk.core.errors import InputError, OurFault, Unauthorised, Unreachable
from edge_sdk.system.terminal import say


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    leave = commands.add_parser("leave", help="give the membership back, and forget the federation")
    destination.add_to(leave)
    leave.add_argument("--state", type=Path, help="the state folder, where `join` was given one")
    leave.add_argument("--name", help="the device's name, where `join` was given one")
    leave.add_argument(
        "--forget", action="store_true", help="forget it here, even if the coordinator cannot be told"
    )
    leave.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Leave. What was handed in until now still counts; text and the base model stay where they are."""
    from edge_sdk.connection.transport import Transport
    from edge_sdk.membership.journal import Journal
    from edge_sdk.membership.known_coordinator import trust_in
    from edge_sdk.options import Options, default_state_dir

    to = destination.of(options)
    if options.state is None and to is None:
        raise InputError("give the address of the coordinator, or --state FOLDER")
    ca = Path(options.ca) if options.ca else None
    chosen = Options(name=options.name or Options().name, ca=ca, insecure=bool(options.insecure))
    folder = options.state or default_state_dir(to.url if to else "", chosen.name)
    if not folder.is_dir():
        raise InputError(f"{folder}: no state folder; name the one that `join` used with --state")
    journal = Journal(folder)
    with journal.held():
        session = journal.load()
        if session is None:
            raise InputError(f"{folder}: this device is no member of a federation")
        trust = trust_in(session.url, "", chosen, session)
        transport = Transport(session.url, session.credential, trust=trust)
        try:
            transport.leave()
        except Unauthorised:
            say("the coordinator does not know this device any more")
        except (Unreachable, OurFault) as error:
            if not options.forget:
                raise
            say(f"the coordinator was not told: {error}")
        finally:
            transport.close()
        journal.forget()
    say(f"left federation {session.federation.id}; what was handed in still counts")
    return 0
