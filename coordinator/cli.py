"""`edge-coordinator`: host a federation, look at it, take the adapter out of it."""

from __future__ import annotations

import argparse
import os
import sys

from coordinator.commands import audit, backup, devices, export, invite, revert, serve, status
from coordinator.storage import failpoints
from edge_sdk.core.version import __version__
from edge_sdk.system.terminal import run_command

COMMANDS = (serve, invite, devices, status, export, revert, backup, audit)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 on bad input, with one line that says what to do."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
        return int(options.run(options))

    return run_command("edge-coordinator", run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-coordinator", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
