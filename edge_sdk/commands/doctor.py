"""`edge-sdk doctor`: is this machine fit to take part?"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from edge_sdk.commands import destination
from edge_sdk.commands.device_config import TRUST
from edge_sdk.core.records import to_json
from edge_sdk.system.terminal import say_text


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    doctor = commands.add_parser(
        "doctor",
        help="is this machine fit to take part?",
        description="Checks this machine and says what mends it. Nothing is joined or downloaded.",
        epilog="Exit code: 0 fit, warnings or not; 1 something must be mended first; 2 the command is wrong.",
    )
    destination.add_to(doctor)
    doctor.add_argument("--data", type=Path, help="JSONL file with this device's own text")
    doctor.add_argument("--model", help="base model (default: the federation's, or `tiny`)")
    doctor.add_argument("--state", type=Path, help="folder that joining would use")
    doctor.add_argument("--device", default="auto", help="torch device (default: the best there is)")
    doctor.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print each check as it is made, and the verdict: 0 if the machine is fit, otherwise 1."""
    from edge_sdk.diagnosis import doctor
    from edge_sdk.diagnosis.check import painted, rendered
    from edge_sdk.options import Options

    to = destination.of(options)
    plan = doctor.JoinPlan(
        options=Options(
            model=options.model,
            state_dir=options.state,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            ca=Path(options.ca) if options.ca else None,
            insecure=bool(options.insecure),
        ),
        url=to.url if to else None,
        token=to.token if to else None,
        pin=to.pin if to else "",
        data=options.data,
    )
    terminal = sys.stdout.isatty()
    colours = terminal and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns if terminal else None
    checks = []
    for check in doctor.examine(plan):
        checks.append(check)
        if not options.json:
            head = painted(check.state) if colours else ""
            say_text(rendered(check, width, colours).removeprefix(head) + "\n", head)
    fit = doctor.fit(checks)
    if options.json:
        say_text(json.dumps({"fit": fit, "checks": [to_json(check) for check in checks]}, indent=1) + "\n")
    else:
        say_text(f"\n{doctor.verdict(plan, checks)}\n")
    return 0 if fit else 1
