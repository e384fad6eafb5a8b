"""`edge-coordinator`: host a federation, look at it, take the adapter out of it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

from coordinator.adapters.serving import export
from coordinator.merging.torch_svd import decompose_on
from coordinator.privacy import ledger
from coordinator.service.coordinator import Coordinator
from coordinator.service.other_runs import worked_elsewhere
from coordinator.service.process_limits import (
    disk_threads,
    give_memory_back,
    raise_file_limit,
    take_turns_often,
)
from coordinator.service.reverting import revert
from coordinator.settings import Settings, load_settings
from coordinator.storage import failpoints
from coordinator.storage.blobs import Blobs
from coordinator.upkeep.backup import back_up, require_finished
from coordinator.upkeep.data_folder import only_coordinator, open_existing
from coordinator.web.app import build_app
from coordinator.web.server import make_runner
from edge_sdk.core.errors import InputError
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.version import __version__
from edge_sdk.core.words import printable
from edge_sdk.system.durable import for_others
from edge_sdk.system.terminal import log_to_terminal, run_command, say

SHOWN_VERSIONS = 5
BACKLOG = 2048  # connections that may wait to be accepted, when many devices wake together


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 on bad input, with one line that says what to do."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
        return int(options.run(options))

    return run_command("edge-coordinator", run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-coordinator", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the coordinator until interrupted")
    serve.add_argument("--data", type=Path, required=True, help="folder for everything that must survive")
    serve.add_argument("--config", type=Path, help="TOML file; without one, the defaults and the tiny base")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--device", default="cpu", help="where versions are computed: cpu, cuda, cuda:1 …")
    serve.add_argument("--port", type=int, default=8765, help="0 picks a free one (default %(default)s)")
    serve.set_defaults(run=_serve)

    status = commands.add_parser("status", help="say what a data folder holds")
    status.add_argument("--data", type=Path, required=True)
    status.set_defaults(run=_status)

    take = commands.add_parser("export", help="write the global adapter as a PEFT folder")
    take.add_argument("--data", type=Path, required=True)
    take.add_argument("--out", type=Path, required=True)
    take.add_argument("--version", type=int, help="default: the newest")
    take.add_argument("--rank", type=int, help="default: the live rank of that version")
    take.set_defaults(run=_export)

    back = commands.add_parser("revert", help="go back: a new version with the content of an older one")
    back.add_argument("--data", type=Path, required=True)
    back.add_argument("--to", type=int, required=True, metavar="VERSION", help="0: as if nothing was learnt")
    back.set_defaults(run=_revert)

    backup = commands.add_parser("backup", help="copy a data folder, also while a coordinator runs on it")
    backup.add_argument("--data", type=Path, required=True)
    backup.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there")
    backup.set_defaults(run=_backup)
    return parser


def _serve(options: argparse.Namespace) -> int:
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
    runner = make_runner(build_app(coordinator), coordinator.refusals)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port, backlog=BACKLOG)
        try:
            await site.start()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"cannot listen on {options.host}:{options.port} ({reason}); choose another --port"
            ) from error
        port = runner.addresses[0][1]
        federation = coordinator.federation
        say(f"federation {federation.id}: {federation.base.model}, rule {federation.rule}")
        if coordinator.privacy:
            say(f"privacy {ledger.worst(coordinator.store, coordinator.privacy.delta)}")
        say(f"listening on http://{options.host}:{port}")
        say(f"join token in {options.data / 'join-token'}; on a device:")
        say(f"  edge-sdk join http://{options.host}:{port} --token TOKEN --data notes.jsonl")
        await stop.wait()
    finally:
        await runner.cleanup()


def _status(options: argparse.Namespace) -> int:
    store, federation = open_existing(options.data)
    versions = store.versions(SHOWN_VERSIONS)
    say(f"federation  {federation.id}  ({federation.base.model}, rule {federation.rule})")
    say(f"version     {versions[0].version if versions else '0 (nothing merged yet)'}")
    say(f"buffered    {len(store.unmerged())} updates")
    if chosen := ledger.choices(store):
        say(f"privacy     {ledger.worst(store, chosen.delta)}")
    else:
        say(f"clipped     {store.clipped()} updates")
    for id, run in store.elsewhere():
        say(f"device {id} {worked_elsewhere(run)}")
    say(f"{'device':<24}{'rank':>6}{'merged':>8}{'staleness':>11}{'refused':>9}")
    for device in store.devices():
        shown = f"{device.updates:>8}{device.mean_staleness:>11.2f}{device.refused:>9}"
        say(f"{printable(device.name, 23):<24}{device.rank:>6}{shown}")
    if versions:
        say(f"{'version':<24}{'rank':>6}{'updates':>8}{'dropped':>11}  (rank cap {federation.rank_cap})")
    for version in versions:
        merged = store.merged_updates(version.version)
        number = str(version.version)
        if version.reverts_to is not None:
            number += f" (as {version.reverts_to} was)"
        say(f"{number:<24}{version.rank:>6}{merged:>8}{version.discarded_share:>11.2%}")
    return 0


def _export(options: argparse.Namespace) -> int:
    store, federation = open_existing(options.data)
    versions = store.versions(1)
    if not versions:
        raise InputError(f"{options.data}: no version has been published yet")
    number = versions[0].version if options.version is None else options.version
    version = store.version(number)
    if version is None:
        raise InputError(f"--version {number}: there are 1 to {versions[0].version}")
    if version.collected:
        kept = [known.version for known in store.versions(versions[0].version) if not known.collected]
        raise InputError(f"--version {number} was collected; there are {', '.join(map(str, kept))}")
    rank = options.rank or max(1, version.rank)
    if not 1 <= rank <= federation.rank_cap:
        raise InputError(f"--rank {rank}: this federation keeps 1 to {federation.rank_cap}")
    blobs = Blobs(options.data)
    if not blobs.is_intact(version.digest):
        path = blobs.path(version.digest).relative_to(options.data)
        raise InputError(
            f"{options.data}: the file of version {number}, {path}, is damaged or gone; restore it from a "
            "backup, or export another version"
        )
    with for_others():
        export(federation, number, blobs.path(version.digest), rank, options.out)
    say(f"version {number} at rank {rank} written to {options.out}")
    return 0


def _revert(options: argparse.Namespace) -> int:
    require_finished(options.data)
    store, federation = open_existing(options.data)
    made = revert(options.data, store, federation, options.to)
    say(
        f"version {made.version} is what version {options.to} was; "
        "work that began from versions in between is left out"
    )
    return 0


def _backup(options: argparse.Namespace) -> int:
    made = back_up(options.data, options.out)
    say(f"{made} copied to {options.out}; `serve --data {options.out}` goes on from there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
