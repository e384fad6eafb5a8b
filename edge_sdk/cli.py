"""`edge-sdk`: take part in a federation, describe a base model, see what this machine is and lacks."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge_sdk import __version__
from edge_sdk.core.errors import EdgeError, InputError
from edge_sdk.core.messages import RuleName
from edge_sdk.core.records import to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.agent import Agent
    from edge_sdk.commands.device_config import DeviceConfig
    from edge_sdk.options import Event

TOKEN_VARIABLE = "EDGE_JOIN_TOKEN"
SAY_AFTER_S = 0.5  # a stop that takes longer says why


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
    join.add_argument("url", nargs="?", help="address of the coordinator, e.g. http://192.168.1.20:8765")
    join.add_argument("--config", type=Path, help="TOML file with any of these; flags win over it")
    join.add_argument("--data", help="JSONL file with this device's own text")
    join.add_argument("--token", help=f"join token, needed the first time (or set {TOKEN_VARIABLE})")
    join.add_argument("--name", help="how the host sees this device (default: the host name)")
    join.add_argument("--model", help="where the base model lies here (default: what the federation names)")
    join.add_argument("--state", help="folder for what must survive a crash")
    join.add_argument("--profile", help="a device class of profiles/, or a TOML file, in place of measuring")
    join.add_argument(
        "--memory-budget", help="memory that training may take, e.g. 6GB (default: half of what is free)"
    )
    join.add_argument("--rank", help="train this rank alone: a number, or attention=30,mlp=200")
    join.add_argument("--duty", type=float, help="share of the time to compute, e.g. 0.3 (default 1)")
    join.add_argument("--threads", type=int, help="compute threads (default 1)")
    join.add_argument("--nice", type=int, help="0 (as important as any program) to 19 (default 10)")
    join.add_argument("--updates", type=int, help="stop after this many updates (default: go on)")
    join.add_argument("--device", help="torch device (default: the best there is)")
    whole = "keep the base in 16 or 32 bits"
    join.add_argument("--no-quantise", dest="quantise", action="store_const", const=False, help=whole)
    _add_conditions(join)
    join.set_defaults(run=_join)

    _add_chat(commands.add_parser("chat", help="ask the base with the newest version of the adapter"))

    base = commands.add_parser("base", help="print the record of a base model that a coordinator needs")
    base.add_argument("model", help="`tiny`, a Hugging Face id or a directory")
    base.add_argument(
        "--targets", default="all-linear", help="LoRA targets (default: every linear layer of the blocks)"
    )
    base.add_argument("-o", "--out", type=Path, help="write to this file")
    base.set_defaults(run=_base)

    _add_profile(commands)
    _add_doctor(commands)
    return parser


def _add_profile(commands: Any) -> None:
    """The parser of `edge-sdk profile`."""
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
    model.add_argument("--rule", choices=get_args(RuleName), help="of the federation (default flexlora)")
    model.add_argument("--rank-cap", type=int, help="rank of the global adapter that `carry` carries (32)")
    model.add_argument("--steps", type=int, help="of an assignment (default 20)")
    model.add_argument("--batch", type=int, help="examples in a step (default 8)")
    model.add_argument("--sequence-len", type=int, help="tokens of an example (default 256)")
    model.add_argument("--deadline", type=float, metavar="SECONDS", help="for an assignment (default: none)")
    model.add_argument("--device", help="torch device (default: the best there is)")
    model.add_argument("--threads", type=int, help="compute threads (default 1)")
    whole = "keep the base in 16 or 32 bits"
    model.add_argument("--no-quantise", dest="quantise", action="store_const", const=False, help=whole)
    profile.set_defaults(run=_profile, only_with_model=[action.dest for action in model._group_actions])


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


def _add_conditions(join: argparse.ArgumentParser) -> None:
    when = join.add_argument_group("conditions", "Train only while they hold, and give the memory back else.")
    when.add_argument("--only-on-mains", action="store_true", help="not on battery power")
    when.add_argument("--battery-above", type=int, metavar="PERCENT", help="charge of the battery")
    when.add_argument(
        "--cpu-below", type=int, metavar="PERCENT", help="of the processors in use by other programs"
    )
    when.add_argument("--hours", metavar="HH:MM-HH:MM", help="local time, e.g. 22:00-07:00")
    when.add_argument("--unmetered", action="store_true", help="not on a link that costs by volume (Linux)")


def _add_chat(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("url", help="address of the coordinator")
    chat.add_argument("--token", help=f"join token, where this device has not joined (or {TOKEN_VARIABLE})")
    chat.add_argument("--name", help="how the host sees this device (default: the host name)")
    chat.add_argument("--model", help="where the base model lies here (default: what the federation names)")
    chat.add_argument("--state", type=Path, help="the folder that `join` uses, if you named one")
    chat.add_argument("--threads", type=int, default=1, help="compute threads (default %(default)s)")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (%(default)s)")
    chat.add_argument("--device", default="auto", help="torch device (default: the best there is)")
    chat.add_argument("--no-quantise", action="store_true", help="keep the base in 16 or 32 bits")
    chat.set_defaults(run=_chat)


def _join(options: argparse.Namespace) -> int:
    from edge_sdk.agent import Agent
    from edge_sdk.commands.device_config import load_device_config
    from edge_sdk.system import priority

    config = _told(options)
    if options.config:
        config = config.over(load_device_config(options.config))
    if config.url is None:
        raise InputError('give the address of the coordinator, or url = "…" in a --config file')
    if config.data is None:
        raise InputError('give --data FILE, or data = "…" in a --config file')
    if config.updates is not None and config.updates < 1:
        raise InputError(f"--updates {config.updates} must be 1 or more")
    chosen = config.options()
    priority.lower_process(chosen.nice)
    agent = Agent(
        config.url,
        data=config.data,
        join_token=config.token or os.environ.get(TOKEN_VARIABLE),
        options=chosen,
        on_event=_event_printer(),
    )
    _stop_on_signals(agent)
    try:
        agent.run(updates=config.updates)
    finally:
        agent.close()
    return 0


def _told(options: argparse.Namespace) -> DeviceConfig:
    """What the flags say."""
    from edge_sdk.commands.device_config import DeviceConfig
    from edge_sdk.conditions import Conditions

    names = {field.name for field in dataclasses.fields(DeviceConfig)} - {"conditions"}
    values = {name: getattr(options, name) for name in names}
    conditions = Conditions(
        on_mains=options.only_on_mains,
        battery_above=options.battery_above,
        cpu_below=options.cpu_below,
        hours=options.hours,
        unmetered=options.unmetered,
    )
    return DeviceConfig(**values, conditions=conditions)


def _stop_on_signals(agent: Agent) -> None:
    """End calmly on the first signal, saying what is waited for; at once on the second Ctrl-C."""
    asked = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        agent.request_stop()
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def say() -> None:
        asked.wait()
        said = None
        while waiting_for := agent.stop(timeout_s=SAY_AFTER_S).waiting_for:
            if waiting_for != said:
                _say(f"stopping: waiting for {waiting_for}")
            said = waiting_for

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    threading.Thread(target=say, name="edge-sdk-stopping", daemon=True).start()


def _event_printer() -> Callable[[Event], None]:
    """Prints one line for each event that a person wants to read, and a repeated one once."""
    last = ""

    def print_event(event: Event) -> None:
        nonlocal last
        if event.kind in ("step", "adapter") or event.text == last:  # the bar; `training` names the version
            return
        last = event.text
        _say(event.text)

    return print_event


def _say(text: str) -> None:
    """A line with the time, above a progress bar if there is one."""
    from tqdm import tqdm

    with contextlib.suppress(BrokenPipeError):  # nobody reads any more; that is no reason to stop
        tqdm.write(f"{time.strftime('%H:%M:%S')}  {text}")
        sys.stdout.flush()


def _chat(options: argparse.Namespace) -> int:
    from edge_sdk.agent import Agent
    from edge_sdk.commands.chat import HELP, Chat
    from edge_sdk.options import Options

    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} must be 1 or more")
    chosen = {"name": options.name} if options.name else {}
    agent = Agent(
        options.url,
        join_token=options.token or os.environ.get(TOKEN_VARIABLE),
        options=Options(
            **chosen,
            model=options.model,
            state_dir=options.state,
            threads=options.threads,
            device=options.device,
            quantise=not options.no_quantise,
        ),
        on_event=lambda event: None,
    )
    chat = Chat(agent, sys.stdout, sys.stderr, options.max_new_tokens)
    try:
        if not sys.stdin.isatty():
            agent.load()
            chat.answer_lines(sys.stdin)
            return 0
        print(HELP, "Loading the base model …", sep="\n", file=sys.stderr)
        agent.load()
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then has a history and edits the line
        chat.talk(input)
    finally:
        agent.close()
    return 0


def _base(options: argparse.Namespace) -> int:
    from edge_sdk.model import base_model

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
    from edge_sdk.machine.probe import probe
    from edge_sdk.options import cache_dir

    if options.model is not None:
        return _profile_model(options)
    for name in options.only_with_model:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} needs --model, the model that it is about")
    measured = probe(quick=options.quick, folder=cache_dir())
    print(json.dumps(to_json(measured), indent=1) + "\n" if options.json else to_toml(measured), end="")
    return 0


def _profile_model(options: argparse.Namespace) -> int:
    from edge_sdk.commands.profile import question
    from edge_sdk.diagnosis import model_fit, model_fit_report

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"{text} …", file=sys.stderr, flush=True)

    found = model_fit.examine(question(vars(options)), say)
    if options.json:
        print(json.dumps(model_fit_report.as_json(found), indent=1))
    else:
        print(model_fit_report.as_text(found, shutil.get_terminal_size((100, 24)).columns), end="")
    return 0 if found.chosen else 1


def _doctor(options: argparse.Namespace) -> int:
    from edge_sdk.diagnosis import doctor
    from edge_sdk.diagnosis.check import rendered
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
