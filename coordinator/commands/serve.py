"""`edge-coordinator serve`: run the coordinator until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

from coordinator.merging.torch_svd import decompose_on
from coordinator.privacy import ledger
from coordinator.service.coordinator import Coordinator
from coordinator.service.process_limits import (
    disk_threads,
    file_limit,
    give_memory_back,
    raise_file_limit,
    take_turns_often,
)
from coordinator.settings import Settings, load_settings
from coordinator.upkeep.backup import require_finished
from coordinator.upkeep.data_folder import only_coordinator
from coordinator.web.app import build_app
from coordinator.web.connections import Connections
from coordinator.web.server import WebServer
from edge_sdk.core.errors import InputError
from edge_sdk.core.flexlora import Decompose
from edge_sdk.system.terminal import log_to_terminal, say


def add_to(commands: Any) -> None:
    """Add the command and its flags."""
    serve = commands.add_parser("serve", help="run the coordinator until interrupted")
    serve.add_argument("--data", type=Path, required=True, help="folder for everything that must survive")
    serve.add_argument("--config", type=Path, help="TOML file; without one, the defaults and the tiny base")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--device", default="cpu", help="where versions are computed: cpu, cuda, cuda:1 …")
    serve.add_argument("--port", type=int, default=8765, help="0 picks a free one (default %(default)s)")
    serve.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    log_to_terminal()
    settings, by = load_settings(options.config), decompose_on(options.device)
    require_finished(options.data)
    give_memory_back()
    take_turns_often()
    if notice := raise_file_limit():
        say(notice)
    with only_coordinator(options.data):
        asyncio.run(_listen(options, settings, by))
    return 0


async def _listen(options: argparse.Namespace, settings: Settings, by: Decompose) -> None:
    """Serve until SIGINT or SIGTERM, then let a running merge finish."""
    stop = asyncio.Event()
    if sys.platform != "win32":  # Windows loops have no signal handlers; Ctrl-C raises there instead
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().set_default_executor(disk_threads())
    coordinator = Coordinator(options.data, settings, by)
    limits = settings.limits
    most, of_address = limits.connections_within(file_limit())
    strict = limits.connections_of_address is not None
    connections = Connections(most, of_address, strict, limits.answer_s)
    server = WebServer(build_app(coordinator), coordinator.refusals, coordinator.faults, connections)
    try:
        try:
            addresses = await server.start(options.host, options.port)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"cannot listen on {options.host}:{options.port} ({reason}); choose another --port"
            ) from error
        port = addresses[0][1]
        federation = coordinator.federation
        say(f"federation {federation.id}: {federation.base.model}, rule {federation.rule}")
        if coordinator.privacy:
            say(f"privacy {ledger.worst(coordinator.store, coordinator.privacy.delta)}")
        say(f"listening on http://{options.host}:{port}")
        say(f"join token in {options.data / 'join-token'}; on a device:")
        say(f"  edge-sdk join http://{options.host}:{port} --token TOKEN --data notes.jsonl")
        await stop.wait()
    finally:
        await server.stop()
