"""The policies that `benchmarks.async_vs_sync` compares, and those that they were chosen from.

Virtual seconds; the device in the middle trains 600 s an assignment, the slowest 30 000 s. What is not named
here is the coordinator's default.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.async_report import BUFFERED, OVER, SYNCHRONOUS
from coordinator.policy import Policy
from edge_sdk.core.staleness import Name

# No version comes before K updates are in, whatever the time, and no update is too old. A lease is half of
# what the device in the middle trains: whoever takes longer is told to finish, and hands in what it has.
_COMMON = Policy(buffer_size=4, quorum=4, timeout_s=1e9, lease_s=300.0, max_staleness=1000, retry_s=10.0)
SLOTS = 8  # twice K

POLICIES = {
    BUFFERED: replace(_COMMON, concurrency=SLOTS),
    SYNCHRONOUS: replace(_COMMON, mode="synchronous"),
    OVER: replace(_COMMON, mode="synchronous", over_selection=0.3),
}

LEASES_S = (300.0, 600.0, 900.0, 1800.0)
BUFFER_SIZES = (2, 4, 8, 16)
FUNCTIONS: tuple[Name, ...] = ("constant", "polynomial", "hinge")


def candidates() -> dict[str, Policy]:
    """What was compared on a seed that no result uses; POLICIES have the lease that suits rounds best."""
    rounds, over, buffers = POLICIES[SYNCHRONOUS], POLICIES[OVER], POLICIES[BUFFERED]
    found = {f"{SYNCHRONOUS}, lease {s:g}": replace(rounds, lease_s=s) for s in LEASES_S}
    found |= {f"{OVER}, lease {s:g}": replace(over, lease_s=s) for s in LEASES_S[:2]}
    return found | {
        f"{BUFFERED}, {slots or 'all'} slots": replace(buffers, concurrency=slots) for slots in (8, None)
    }


def sweep_of_k() -> dict[str, Policy]:
    """The buffered policy by K."""
    return {str(k): replace(POLICIES[BUFFERED], buffer_size=k, quorum=k) for k in BUFFER_SIZES}


def sweep_of_staleness() -> dict[str, Policy]:
    """The buffered policy by staleness function."""
    return {name: replace(POLICIES[BUFFERED], staleness=name) for name in FUNCTIONS}
