"""Where to: an invitation or an address, as a command is given it, and what may be said about the way there.

A command line stands in the list of processes, which every user of the machine may read. So an invitation may
come from standard input, from a file or from the environment as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import MOST, Invitation, is_invitation, parse

INVITATION_VARIABLE = "EDGE_INVITATION"  # where the invitation may be, if nothing else says where to
TOKEN_VARIABLE = "EDGE_JOIN_TOKEN"  # where the join token may be, beside an address
STANDARD_INPUT, FILE_MARK = "-", "@"


@dataclass(frozen=True)
class Destination:
    """A coordinator, and what lets a device in. `url` is its address, whether it was invited or not."""

    url: str
    token: str | None = field(default=None, repr=False)
    invitation: Invitation | None = None

    @property
    def pin(self) -> str:
        """Of the coordinator's key, if the invitation says it."""
        return self.invitation.pin if self.invitation else ""

    def for_agent(self) -> dict[str, Any]:
        """As an `Agent` takes it."""
        if self.invitation:
            return {"url": str(self.invitation)}
        return {"url": self.url, "join_token": self.token}


def add_to(command: Any) -> None:
    """Add the argument and the flags to a command."""
    where = "an invitation, @FILE or - (standard input) to read it from, or, once joined, an address"
    command.add_argument(
        "url", nargs="?", metavar="INVITATION", help=f"{where} (default: {INVITATION_VARIABLE})"
    )
    command.add_argument("--token", help=f"join token, beside an address (or set {TOKEN_VARIABLE})")
    command.add_argument("--ca", help="PEM file of the authorities that may vouch for the coordinator")
    command.add_argument(
        "--insecure", action="store_const", const=True, help="let secrets and adapters travel in plain HTTP"
    )


def find(text: str | None, flagged: str | None = None, filed: str | None = None) -> Destination | None:
    """Where to; None where nothing says it.

    Args:
        text: the argument, or what a configuration file has in its place.
        flagged: the join token, as a flag says it.
        filed: the join token, as a configuration file says it.

    Raises:
        InputError: what is named holds no invitation, or there is a second token beside it.
    """
    invitation = _invitation(text)
    if invitation is None:
        token = flagged or filed or os.environ.get(TOKEN_VARIABLE)
        return None if text is None else Destination(text, token)
    if flagged:
        raise InputError("an invitation brings its own token; leave out --token")
    return Destination(invitation.url, invitation.token, invitation)


def of(options: argparse.Namespace) -> Destination | None:
    """Where a command line says to go, of a command that takes no file."""
    return find(options.url, options.token)


def _invitation(text: str | None) -> Invitation | None:
    """The invitation that `text` is or names; None for an address, and for nothing."""
    if text is None:
        held, where = os.environ.get(INVITATION_VARIABLE) or None, INVITATION_VARIABLE
    elif text == STANDARD_INPUT:
        held, where = sys.stdin.readline(MOST + 2), "standard input"
    elif text.startswith(FILE_MARK):
        held, where = _read(Path(text.removeprefix(FILE_MARK))), text.removeprefix(FILE_MARK)
    else:
        return parse(text) if is_invitation(text) else None
    if held is None:
        return None
    try:
        return parse(held)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST + 2)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no invitation, for it is not text") from error
    except OSError as error:
        raise InputError(f"{path}: the invitation cannot be read ({error.strerror})") from error
