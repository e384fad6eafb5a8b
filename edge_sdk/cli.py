"""`edge-sdk`: take part in a federation, describe a base model, see what this machine is and lacks."""

from __future__ import annotations

import argparse
import sys

from edge_sdk.commands import base, chat, doctor, join, leave, profile
from edge_sdk.core.version import __version__
from edge_sdk.system.terminal import run_command

COMMANDS = (join, leave, chat, base, profile, doctor)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 on bad input, with one line that says what to do."""
    options = _parser().parse_args(arguments)
    return run_command("edge-sdk", lambda: int(options.run(options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-sdk", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
