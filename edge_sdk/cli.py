"""`edge-sdk`: take part in a federation, describe a base model, see what this machine is and lacks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk import __version__
from edge_sdk.core.errors import EdgeError, InputError
from edge_sdk.core.records import to_json

if TYPE_CHECKING:
    from edge_sdk.options import Event

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TOKEN_VARIABLE = "EDGE_JOIN_TOKEN"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 on bad input, with one line that says what to do."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EdgeError as error:
        print(f"edge-sdk: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-sdk", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    join = commands.add_parser("join", help="take part in a federation until interrupted")
    join.add_argument("url", help="address of the coordinator, e.g. http://192.168.1.20:8765")
    join.add_argument("--data", type=Path, required=True, help="JSONL file with this device's own text")
    join.add_argument("--token", help=f"join token, needed the first time (or set {TOKEN_VARIABLE})")
    join.add_argument("--name", help="how the host sees this device (default: the host name)")
    join.add_argument("--model", help="where the base model lies here (default: what the federation names)")
    join.add_argument("--state", type=Path, help="folder for what must survive a crash")
    join.add_argument("--profile", help="a device class of profiles/, or a TOML file, in place of measuring")
    join.add_argument(
        "--memory-budget", help="memory that training may take, e.g. 6GB (default: half of what is free)"
    )
    join.add_argument(
        "--duty", type=float, default=1.0, help="share of the time to compute, e.g. 0.3 (default 1)"
    )
    join.add_argument("--threads", type=int, default=1, help="compute threads (default %(default)s)")
    join.add_argument("--updates", type=int, help="stop after this many updates (default: go on)")
    join.add_argument("--device", default="auto", help="torch device (default: the best there is)")
    join.add_argument("--no-quantise", action="store_true", help="keep the base in 16 or 32 bits")
    join.set_defaults(run=_join)

    base = commands.add_parser("base", help="print the record of a base model that a coordinator needs")
    base.add_argument("model", help="`tiny`, a Hugging Face id or a directory")
    base.add_argument(
        "--targets", default="all-linear", help="LoRA targets (default: every linear layer of the blocks)"
    )
    base.add_argument("-o", "--out", type=Path, help="write to this file")
    base.set_defaults(run=_base)

    profile = commands.add_parser("profile", help="measure this machine and print its profile")
    profile.add_argument("--quick", action="store_true", help="skip the timing")
    profile.add_argument("--json", action="store_true", help="print JSON in place of TOML")
    profile.set_defaults(run=_profile)
    _add_doctor(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    """The parser of `edge-sdk doctor`."""
    doctor = commands.add_parser(
        "doctor",
        help="is this machine fit to take part?",
        description="Checks this machine and says what mends it. Nothing is joined or downloaded.",
        epilog="Exit code: 0 fit, warnings or not; 1 something must be mended first; 2 the command is wrong.",
    )
    doctor.add_argument("url", nargs="?", help="address of the coordinator (default: the machine alone)")
    doctor.add_argument("--token", help=f"join token (or set {TOKEN_VARIABLE})")
    doctor.add_argument("--data", type=Path, help="JSONL file with this device's own text")
    doctor.add_argument("--model", help="base model (default: the federation's, or `tiny`)")
    doctor.add_argument("--state", type=Path, help="folder that joining would use")
    doctor.add_argument("--device", default="auto", help="torch device (default: the best there is)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)


def parse_bytes(text: str) -> int:
    """`6GB`, `512 MiB` or `1000000` as bytes.

    Raises:
        InputError: not a size.
    """
    number = text.strip().rstrip("BbIiKkMmGg").strip()
    unit = text.strip()[len(text.strip().rstrip("BbIiKkMmGg")) :].strip().upper()
    try:
        value = float(number)
    except ValueError as error:
        raise InputError(f"{text!r} is not a size; write it like 6GB or 512MiB") from error
    if unit not in UNITS or not 0 < value < float("inf"):
        raise InputError(f"{text!r} is not a size; write it like 6GB or 512MiB")
    return int(value * UNITS[unit])


def _join(options: argparse.Namespace) -> int:
    from edge_sdk.agent import Agent
    from edge_sdk.core.profile import load_profile
    from edge_sdk.options import Options

    if options.updates is not None and options.updates < 1:
        raise InputError(f"--updates {options.updates} must be 1 or more")
    chosen = {"name": options.name} if options.name else {}
    agent = Agent(
        options.url,
        data=options.data,
        join_token=options.token or os.environ.get(TOKEN_VARIABLE),
        options=Options(
            **chosen,
            model=options.model,
            state_dir=options.state,
            profile=load_profile(options.profile) if options.profile else None,
            memory_budget_bytes=parse_bytes(options.memory_budget) if options.memory_budget else None,
            duty=options.duty,
            threads=options.threads,
            device=options.device,
            quantise=not options.no_quantise,
            progress=None,
        ),
        on_event=print_event,
    )
    signal.signal(signal.SIGTERM, lambda *_: agent.request_stop())
    signal.signal(signal.SIGINT, lambda *_: agent.request_stop())
    try:
        agent.run(updates=options.updates)
    finally:
        agent.close()
    return 0


def print_event(event: Event) -> None:
    """One line for each event that a person wants to read."""
    if event.kind != "step":
        print(f"{time.strftime('%H:%M:%S')}  {event.text}", flush=True)


def _base(options: argparse.Namespace) -> int:
    from edge_sdk import base_model

    record = base_model.describe(options.model, options.targets)
    text = json.dumps(to_json(record), indent=1) + "\n"
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.write_text(text)
    except OSError as error:
        raise InputError(f"{options.out}: {error.strerror}") from error
    print(f"{options.model}: {len(record.modules)} target modules, fingerprint {record.fingerprint[:12]}")
    return 0


def _profile(options: argparse.Namespace) -> int:
    from edge_sdk.core.profile import to_toml
    from edge_sdk.options import cache_dir
    from edge_sdk.probe import probe

    measured = probe(quick=options.quick, folder=cache_dir())
    print(json.dumps(to_json(measured), indent=1) + "\n" if options.json else to_toml(measured), end="")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from edge_sdk import doctor
    from edge_sdk.check import rendered
    from edge_sdk.options import Options

    question = doctor.Question(
        options=Options(model=options.model, state_dir=options.state, device=options.device),
        url=options.url,
        token=options.token or os.environ.get(TOKEN_VARIABLE),
        data=options.data,
    )
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    checks = []
    for check in doctor.examine(question):
        checks.append(check)
        if not options.json:
            print(rendered(check, width, terminal and "NO_COLOR" not in os.environ), flush=True)
    fit = doctor.fit(checks)
    if options.json:
        print(json.dumps({"fit": fit, "checks": [to_json(check) for check in checks]}, indent=1))
    else:
        print(f"\n{doctor.verdict(question, checks)}")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
