"""The policies that `benchmarks.async_vs_sync` compares, and those that they were chosen from.

Virtual seconds; the device in the middle trains 600 s an assignment, the slowest 30 000 s. What is not named
here is the coordinator's default.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.async_report import BUFFERED, OVER, SYNCHRONOUS
from coordinator.policy import Policy
from edge_sdk.core.staleness import Name

# No version comes before K updates are in, whatever the time, and no update is too old.
_COMMON = Policy(buffer_size=4, quorum=4, timeout_s=1e9, max_staleness=1000, retry_s=10.0)

POLICIES = {
    BUFFERED: replace(_COMMON, lease_s=3600.0, concurrency=12),
    SYNCHRONOUS: replace(_COMMON, mode="synchronous", lease_s=900.0),
    OVER: replace(_COMMON, mode="synchronous", lease_s=900.0, over_selection=0.3),
}

BUFFER_SIZES = (2, 4, 8, 16)
FUNCTIONS: tuple[Name, ...] = ("constant", "polynomial", "hinge")


def candidates() -> dict[str, Policy]:
    """What was compared on a seed and clients that no result uses."""
    rounds, over, buffers = POLICIES[SYNCHRONOUS], POLICIES[OVER], POLICIES[BUFFERED]
    found = {f"{SYNCHRONOUS}, lease {s:g}": replace(rounds, lease_s=s) for s in (900.0, 1800.0)}
    found[f"{SYNCHRONOUS}, half after 300"] = replace(rounds, quorum=2, timeout_s=300.0, lease_s=3600.0)
    found[f"{SYNCHRONOUS}, η 0.5"] = replace(rounds, server_learning_rate=0.5)
    found |= {f"{OVER}, lease {s:g}": replace(over, lease_s=s) for s in (900.0, 1800.0)}
    found |= {f"{BUFFERED}, {slots} slots": replace(buffers, concurrency=slots) for slots in (12, None)}
    found[f"{BUFFERED}, η 0.5"] = replace(buffers, server_learning_rate=0.5)
    return found


def sweep_of_k() -> dict[str, Policy]:
    """The buffered policy by K."""
    return {str(k): replace(POLICIES[BUFFERED], buffer_size=k, quorum=k) for k in BUFFER_SIZES}


def sweep_of_staleness() -> dict[str, Policy]:
    """The buffered policy by staleness function."""
    return {name: replace(POLICIES[BUFFERED], staleness=name) for name in FUNCTIONS}
