"""One device of `examples.natural_instructions`, which starts it: the embedded agent, its budget scaled."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from edge_sdk.agent import Agent
from edge_sdk.core.errors import EdgeError
from edge_sdk.options import Event, Options


def run(options: argparse.Namespace) -> None:
    """Train on `train.jsonl` until told to stop."""
    home: Path = options.home

    def note(event: Event) -> None:
        if event.kind != "step":
            print(f"{options.name}: {event.text}", flush=True)

    agent = Agent(
        options.url,
        data=home / "train.jsonl",
        join_token=options.token,
        options=Options(
            name=options.name,
            state_dir=home / "state",
            memory_budget_bytes=options.budget,
            budget_covers_libraries=False,  # the budget is scaled to the small base; the libraries are not
            isolate=False,  # this process is the device, and nothing else
            progress=False,
        ),
        on_event=note,
    )
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
