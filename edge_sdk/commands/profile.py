"""`edge-sdk profile`: measure this machine; with a model, whether it could be trained, and at which rank."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge_sdk.commands.device_config import DeviceConfig
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import OWN_RULES, Training
from edge_sdk.core.records import to_json
from edge_sdk.system.terminal import complain, say_text

if TYPE_CHECKING:
    from edge_sdk.diagnosis.model_fit import FitQuestion

LADDER = (2, 4, 8, 16, 32)


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    profile = commands.add_parser(
        "profile",
        help="measure this machine; with --model: which rank would fit?",
        description="Measures this machine and prints its profile. With --model: whether that model could be "
        "trained here, and at which rank. No weights are needed and nothing is downloaded.",
        epilog="Exit code: 0; 1 if the model does not fit; 2 if the command is wrong.",
    )
    profile.add_argument("--quick", action="store_true", help="skip the timing")
    profile.add_argument("--json", action="store_true", help="print JSON")
    model = profile.add_argument_group("with a model")
    model.add_argument("--model", help="`tiny`, a directory, a downloaded model, or a bare config.json")
    model.add_argument(
        "--profile", help="a device class of profiles/, or a TOML file, in place of this machine"
    )
    model.add_argument("--memory-budget", help="e.g. 6GB (default: half of what is free)")
    model.add_argument("--ladder", help="ranks to choose from (default 2,4,8,16,32)")
    model.add_argument("--rank", help="this rank alone: a number, or attention=30,mlp=200")
    model.add_argument("--rule", help="of the federation (default flexlora)")
    model.add_argument(
        "--carries",
        action=argparse.BooleanOptionalAction,
        help="whether devices hold the global adapter frozen under a rule that is not one of this project's",
    )
    model.add_argument("--rank-cap", type=int, help="rank of the global adapter that `carry` carries (32)")
    model.add_argument("--steps", type=int, help="of an assignment (default 20)")
    model.add_argument("--batch", type=int, help="examples in a step (default 8)")
    model.add_argument("--sequence-len", type=int, help="tokens of an example (default 256)")
    model.add_argument("--deadline", type=float, metavar="SECONDS", help="for an assignment (default: none)")
    model.add_argument("--device", help="torch device (default: the best there is)")
    model.add_argument("--threads", type=int, help="compute threads (default 1)")
    whole = "keep the base in 16 or 32 bits"
    model.add_argument("--no-quantise", dest="quantise", action="store_const", const=False, help=whole)
    profile.set_defaults(run=run, only_with_model=[action.dest for action in model._group_actions])


def run(options: argparse.Namespace) -> int:
    """Print the profile, or the answer about a model: 0, or 1 if the model does not fit."""
    from edge_sdk.core.profile import to_toml
    from edge_sdk.machine.probe import probe
    from edge_sdk.options import cache_dir

    if options.model is not None:
        return _about_model(options)
    for name in options.only_with_model:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --model, the model that it is about")
    measured = probe(quick=options.quick, folder=cache_dir())
    say_text(json.dumps(to_json(measured), indent=1) + "\n" if options.json else to_toml(measured))
    return 0


def _about_model(options: argparse.Namespace) -> int:
    from edge_sdk.diagnosis import model_fit, model_fit_report

    def say(text: str) -> None:
        if sys.stderr.isatty():
            complain(f"{text} …")

    found = model_fit.examine(question(vars(options)), say)
    if options.json:
        say_text(json.dumps(model_fit_report.as_json(found), indent=1) + "\n")
    else:
        say_text(model_fit_report.as_text(found, shutil.get_terminal_size((100, 24)).columns))
    return 0 if found.chosen else 1


def question(flags: Mapping[str, Any]) -> FitQuestion:
    """A question from flags by name; None is a flag that was not given.

    Raises:
        InputError: a value that cannot be; names the flag.
    """
    from edge_sdk.diagnosis.model_fit import FitQuestion

    for name in ("rank_cap", "steps", "batch", "sequence_len", "deadline"):
        value = flags[name]
        if value is not None and not value >= 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if flags["rank"] and flags["ladder"]:
        raise InputError("give --rank, which is one rank, or --ladder, not both")
    rule, carries = flags["rule"], flags["carries"]
    own = rule is None or rule in OWN_RULES
    if own and carries is not None:
        raise InputError("--carries is for a --rule from elsewhere; of this project's rules it is known")
    if not own and carries is None:
        raise InputError(
            f"--rule {rule} is none of {', '.join(OWN_RULES)}; for a rule from elsewhere add --carries if "
            "its devices hold the global adapter frozen, --no-carries otherwise"
        )
    names = ("profile", "memory_budget", "rank", "device", "threads", "quantise")
    chosen = DeviceConfig(**{name: flags[name] for name in names}).options()
    training = {name: flags[name] for name in ("steps", "batch", "sequence_len") if flags[name]}
    return FitQuestion(
        model=flags["model"],
        options=chosen,
        ladder=parse_ladder(flags["ladder"]) if flags["ladder"] is not None else LADDER,
        training=Training(**training),
        deadline_s=flags["deadline"],
        calibrate=not flags["quick"],
        **{name: flags[name] for name in ("rule", "rank_cap", "carries") if flags[name] is not None},
    )


def parse_ladder(text: str) -> tuple[int, ...]:
    """`2,4,8` as ranks.

    Raises:
        InputError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"ladder {text!r}: write ranks like 2,4,8,16")
    return tuple(int(part) for part in parts)
