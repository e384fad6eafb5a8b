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
    small_tls_buffers,
    take_turns_often,
)
from coordinator.settings import Settings, load_settings
from coordinator.upkeep.announcement import announce
from coordinator.upkeep.backup import require_finished
from coordinator.upkeep.data_folder import only_coordinator
from coordinator.web.app import build_app
from coordinator.web.connections import Connections
from coordinator.web.endpoint import Endpoint
from coordinator.web.server import WebServer
from coordinator.web.tls import Certificate, renewing
from edge_sdk.core.addresses import in_url
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
    serve.add_argument(
        "--cert", type=Path, metavar="FILE", help="PEM file: certificate and chain, in place of one made here"
    )
    serve.add_argument(
        "--key", type=Path, metavar="FILE", help="PEM file: its private key (default: in the same file)"
    )
    serve.add_argument("--tls", action="store_true", help="also where only this machine can connect")
    serve.add_argument("--insecure", action="store_true", help="plain HTTP, also to other machines")
    serve.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    log_to_terminal()
    settings, by = load_settings(options.config), decompose_on(options.device)
    endpoint = Endpoint(
        options.host,
        options.port,
        options.cert,
        options.key,
        options.tls,
        options.insecure,
        settings.serving,
    )
    require_finished(options.data)
    give_memory_back()
    take_turns_often()
    small_tls_buffers()
    if notice := raise_file_limit():
        say(notice)
    with only_coordinator(options.data):
        certificate = endpoint.certificate(options.data)
        asyncio.run(_listen(options.data, endpoint, certificate, settings, by))
    return 0


async def _listen(
    data: Path, endpoint: Endpoint, certificate: Certificate | None, settings: Settings, by: Decompose
) -> None:
    """Serve until SIGINT or SIGTERM, then let a running merge finish."""
    tls = certificate.context() if certificate else None
    stop = asyncio.Event()
    if sys.platform != "win32":  # Windows loops have no signal handlers; Ctrl-C raises there instead
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    asyncio.get_running_loop().set_default_executor(disk_threads())
    coordinator = Coordinator(data, settings, by)
    limits = settings.limits
    most, of_address = limits.connections_within(file_limit())
    strict = limits.connections_of_address is not None
    connections = Connections(most, of_address, strict, limits.answer_s, settings.serving.trusts)
    app = build_app(coordinator, endpoint)
    server = WebServer(app, coordinator.refusals, coordinator.faults, connections, tls)
    try:
        try:
            addresses = await server.start(endpoint.host, endpoint.port)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"cannot listen on {in_url(endpoint.host)}:{endpoint.port} ({reason}); choose another --port"
            ) from error
        port = addresses[0][1]
        announcement = endpoint.announcement(port, certificate)
        announce(coordinator.store, announcement)
        federation = coordinator.federation
        say(f"federation {federation.id}: {federation.base.model}, rule {federation.rule}")
        if coordinator.privacy:
            say(f"privacy {ledger.worst(coordinator.store, coordinator.privacy.delta)}")
        say(*endpoint.notices(certificate))
        say(f"listening on {endpoint.address(port, certificate)}")
        say(f"to let a device in:  edge-coordinator invite --data {data}")
        async with renewing(certificate, tls):
            await stop.wait()
    finally:
        await server.stop()
