"""Is this machine fit to take part? Every check in turn, each tried for real where it can be.

Nothing is downloaded and nothing joins; the one thing that is kept are digests of a base model's files, which
joining needs too. Libraries and kernels are tried in child processes: what crashes there is reported here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.core.errors import InputError
from edge_sdk.diagnosis import federation_checks, machine_checks
from edge_sdk.diagnosis.check import Check
from edge_sdk.membership.journal import DIGESTS, SESSION, Journal
from edge_sdk.options import Options, cache_dir, default_state_dir
from edge_sdk.trials.four_bit import four_bit_works

if TYPE_CHECKING:
    from edge_sdk.connection.transport import Transport
    from edge_sdk.core.messages import Federation

NO_TOKEN = "none"  # sent where there is none: a coordinator that refuses it answers


@dataclass(frozen=True)
class JoinPlan:
    """What to look at, as a device would join with it. Without `url` no network is touched."""

    options: Options
    url: str | None = None
    token: str | None = None
    data: Path | None = None
    pin: str = ""  # of the coordinator's key, as the invitation says

    @property
    def folder(self) -> Path:
        """Where the device keeps its state."""
        if self.options.state_dir:
            return self.options.state_dir
        return default_state_dir(self.url.rstrip("/"), self.options.name) if self.url else cache_dir()


def fit(checks: Sequence[Check]) -> bool:
    """Whether the machine can take part: warnings are no hindrance."""
    return all(check.state != "not fine" for check in checks)


def verdict(plan: JoinPlan, checks: Sequence[Check]) -> str:
    """One sentence at the end."""
    bad, warnings = (sum(check.state == state for check in checks) for state in ("not fine", "warning"))
    if bad:
        return f"Not fit yet: {bad} of {len(checks)} checks must be mended first."
    text = "Fit to take part"
    if warnings:
        text += f", with {warnings} warning" + ("s" if warnings > 1 else "")
    return text + ("." if plan.url else ". Give the coordinator's address to check the way there too.")


def examine(plan: JoinPlan) -> Iterator[Check]:
    """Every check, in an order in which a failure explains those that it keeps from being made.

    Raises:
        InputError: the address, the token or the state folder cannot be one.
    """
    if plan.folder.exists() and not plan.folder.is_dir():
        raise InputError(f"{plan.folder}: no usable state folder (it is a file); name another")
    if importlib.util.find_spec("httpx"):
        _transport(plan)  # an address that is none must not wait for the libraries
    yield machine_checks.python_check()
    broken = set()
    for name, check in machine_checks.library_checks():
        yield check
        broken |= {name} - {""}
    federation = None
    if plan.url and "httpx" not in broken:
        found, federation = _coordinator(plan)
        yield from found
    if plan.data is not None:
        yield federation_checks.data_check(plan.data, federation)
    if not broken:
        yield from _training(plan, federation)


def _transport(plan: JoinPlan) -> tuple[Transport, bool] | None:
    """The connection that joining would make, and whether it has a token; None without an address."""
    from edge_sdk.connection.transport import Transport
    from edge_sdk.membership.known_coordinator import names_another_key, trust_in

    if plan.url is None:
        return None
    known = Journal(plan.folder).load() if (plan.folder / SESSION).exists() else None
    trust = trust_in(plan.url, plan.pin, plan.options, known)
    token = known.credential if known and not names_another_key(plan.pin, known) else plan.token
    return Transport(plan.url, token or NO_TOKEN, trust=trust), bool(token)


def _coordinator(plan: JoinPlan) -> tuple[list[Check], Federation | None]:
    """The other end, and its clock if it answered."""
    connection = _transport(plan)
    assert connection is not None
    transport, has_token = connection
    try:
        check, federation = federation_checks.coordinator_check(transport, has_token)
        dated = [federation_checks.clock_check(transport.server_date)] if transport.server_date else []
    finally:
        transport.close()
    return [check, *dated], federation


def _training(plan: JoinPlan, federation: Federation | None) -> Iterator[Check]:
    """What needs every library: the base model, the device, 4-bit training, memory, disk and the rank."""
    from edge_sdk.machine.probe import probe

    options = plan.options
    model = federation_checks.model_check(options, federation, plan.folder / DIGESTS)
    yield model
    profile = options.profile or probe(quick=True, folder=plan.folder)
    place = machine_checks.device_check(options.device, profile)
    yield place
    yield machine_checks.memory_check(profile)
    yield machine_checks.disk_check(plan.folder, federation_checks.disk_needed_bytes(federation))
    if place.state == "not fine":
        return
    tried = four_bit_works(options.device)
    if federation is None or model.state != "fine":  # the rank follows from the model's configuration
        yield machine_checks.four_bit_check(tried)
        return
    rank = federation_checks.rank_check(federation, options, quantise=tried.ok)
    yield machine_checks.four_bit_check(tried, otherwise="" if rank.state == "fine" else rank.found)
    if tried.ok or rank.state == "fine":
        yield rank
