"""`edge-sdk base`: print the record of a base model that a coordinator needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from edge_sdk.commands.device_config import TRUST
from edge_sdk.core.errors import InputError
from edge_sdk.core.records import to_json
from edge_sdk.system.durable import for_others
from edge_sdk.system.terminal import say, say_text


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    base = commands.add_parser("base", help="print the record of a base model that a coordinator needs")
    base.add_argument("model", help="`tiny`, a Hugging Face id or a directory")
    base.add_argument(
        "--targets", default="all-linear", help="LoRA targets (default: every linear layer of the blocks)"
    )
    base.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    base.add_argument("-o", "--out", type=Path, help="write to this file")
    base.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Describe the model, on standard output or in a file."""
    from edge_sdk.model import base_model

    record = base_model.describe(options.model, options.targets, trust_remote_code=options.trust_remote_code)
    text = json.dumps(to_json(record), indent=1) + "\n"
    if options.out is None:
        say_text(text)
        return 0
    try:
        with for_others():
            options.out.write_text(text)
    except OSError as error:
        raise InputError(f"{options.out}: {error.strerror}") from error
    say(f"{options.model}: {len(record.modules)} target modules, fingerprint {record.fingerprint[:12]}")
    return 0
