"""`edge-sdk join`: take part in a federation until interrupted, and say what happens."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.commands import destination
from edge_sdk.commands.device_config import TRUST, DeviceConfig, LimitsConfig, load_device_config
from edge_sdk.conditions import Conditions
from edge_sdk.core.errors import InputError
from edge_sdk.system.terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge_sdk.agent import Agent
    from edge_sdk.options import Event

SAY_AFTER_S = 0.5  # a stop that takes longer says why


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    join = commands.add_parser("join", help="take part in a federation until interrupted")
    destination.add_to(join)
    join.add_argument("--config", type=Path, help="TOML file with any of these; flags win over it")
    join.add_argument("--data", help="JSONL file with this device's own text")
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
    join.add_argument("--trust-remote-code", action="store_const", const=True, help=TRUST)
    join.add_argument(
        "--dry-run", action="store_true", help="join nothing; print what is asked and what would be sent"
    )
    _add_conditions(join)
    _add_limits(join)
    join.set_defaults(run=run)


def _add_conditions(join: argparse.ArgumentParser) -> None:
    when = join.add_argument_group("conditions", "Train only while these hold; otherwise release the memory.")
    when.add_argument("--only-on-mains", action="store_true", help="not on battery power")
    when.add_argument("--battery-above", type=int, metavar="PERCENT", help="charge of the battery")
    when.add_argument(
        "--cpu-below", type=int, metavar="PERCENT", help="of the processors in use by other programs"
    )
    when.add_argument("--hours", metavar="HH:MM-HH:MM", help="local time, e.g. 22:00-07:00")
    when.add_argument("--unmetered", action="store_true", help="not on a link that costs by volume (Linux)")


def _add_limits(join: argparse.ArgumentParser) -> None:
    most = join.add_argument_group(
        "limits", "A federation that asks for more is refused, and nothing fetched."
    )
    most.add_argument(
        "--allow-base",
        action="append",
        metavar="NAME",
        help="base model or its fingerprint; may be repeated",
    )
    most.add_argument(
        "--most-tokens", type=int, help="steps × batch × length of an assignment (default 100000000)"
    )
    most.add_argument("--most-download", metavar="SIZE", help="of one adapter, e.g. 500MB (default 4GiB)")
    most.add_argument(
        "--least-examples", type=int, help="steps × batch behind an update: fewer tell of each (default 8)"
    )


def run(options: argparse.Namespace) -> int:
    """Take part; 0 when told to stop, or when all the updates that were asked for are delivered."""
    from edge_sdk.agent import Agent
    from edge_sdk.system import priority

    config = _told(options)
    if options.config:
        config = config.over(load_device_config(options.config))
    to = destination.find(config.url, options.token, config.token)
    if to is None:
        raise InputError(
            'give the address of the coordinator or an invitation, or url = "…" in a --config file'
        )
    if config.data is None:
        raise InputError('give --data FILE, or data = "…" in a --config file')
    if config.updates is not None and config.updates < 1:
        raise InputError(f"--updates {config.updates} must be 1 or more")
    chosen = config.options()
    if options.dry_run:
        from edge_sdk.diagnosis import dry_run

        say(*dry_run.lines(dry_run.examine(to.url, to.token, Path(config.data), chosen, to.pin)))
        return 0
    priority.lower_process(chosen.nice)
    agent = Agent(
        **to.for_agent(),
        data=config.data,
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
    names = {field.name for field in dataclasses.fields(DeviceConfig)} - {"conditions", "limits"}
    values = {name: getattr(options, name) for name in names}
    conditions = Conditions(
        on_mains=options.only_on_mains,
        battery_above=options.battery_above,
        cpu_below=options.cpu_below,
        hours=options.hours,
        unmetered=options.unmetered,
    )
    limits = LimitsConfig(
        bases=tuple(options.allow_base or ()),
        most_tokens=options.most_tokens,
        most_download=options.most_download,
        least_examples=options.least_examples,
    )
    return DeviceConfig(**values, conditions=conditions, limits=limits)


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

    with tqdm.external_write_mode(sys.stdout):
        say(f"{time.strftime('%H:%M:%S')}  {text}")
