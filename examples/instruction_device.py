"""One device of `examples.natural_instructions`, which starts it: the embedded agent, its budget scaled."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from edge_sdk.core.errors import EdgeError
from examples.embedded import embedded_agent


def run(options: argparse.Namespace) -> None:
    """Train on `train.jsonl` until told to stop."""
    agent = embedded_agent(options)
    signal.signal(signal.SIGTERM, lambda *_: agent.request_stop())
    agent.run()


def main() -> int:
    """Parse the command line and run; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--home", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--url", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--budget", type=int, required=True, help="memory budget in bytes")
    try:
        run(parser.parse_args())
    except EdgeError as error:
        print(f"instruction device: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
