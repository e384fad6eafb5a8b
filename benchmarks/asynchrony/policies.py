"""What `benchmarks.async_vs_sync` compares, and what that was chosen from.

Virtual seconds; the device in the middle trains 600 s an assignment, the slowest 30 000 s. What is not named
here is the coordinator's default.

Rounds come in two kinds. As published (Bonawitz et al. 2019, arXiv:1902.01046), a device does all of its work
or nothing counts; a lease that ends gives its place to another, and who comes late still counts while the
round is open. With `finish`, as the coordinator has them, who is late is told to hand in what it has done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.asynchrony.report import BUFFERED, FINISH, OVER, OVER_FINISH, SYNCHRONOUS
from coordinator.engine.policy import Policy
from coordinator.engine.weights import Discount


@dataclass(frozen=True)
class Way:
    """A policy, and whether its devices hand in a part when they are told to finish.

    `longer`: how many times the updates of the others it is watched for. Buffers take less time for twice as
    many than rounds for half of them.
    """

    policy: Policy
    partial: bool = True
    longer: int = 1


Ways = Mapping[str, Way]

K = 16  # of 40 devices
ETA = 2.0
# A quarter of what the device in the middle trains: of LEASES_S the one that suits rounds best.
LEASE_S = 150.0
OVER_SELECTION = 0.3
TUNING_SEEDS = (1000, 1001)  # whose clients no other seed has

BUFFER_SIZES = (4, 8, 16, 24)
SLOTS = (16, 24, None)
FUNCTIONS: tuple[Discount, ...] = ("constant", "polynomial", "hinge")
LEASES_S = (150.0, 300.0, 600.0)


def buffers(
    k: int = K, slots: int | None = None, staleness: Discount = "constant", lease_s: float = LEASE_S
) -> Way:
    """No version comes before K updates are in, whatever the time, and no update is too old."""
    return Way(replace(_of(k, lease_s), concurrency=slots, staleness=staleness))


def rounds(k: int = K, over_selection: float = 0.0, partial: bool = False, lease_s: float = LEASE_S) -> Way:
    """Each of k updates."""
    policy = replace(_of(k, lease_s), mode="synchronous", over_selection=over_selection)
    return Way(policy, partial)


def _of(k: int, lease_s: float) -> Policy:
    """η goes with the size: a mean over more devices is shorter, because they pull apart, and less noisy."""
    return Policy(
        buffer_size=k,
        quorum=k,
        timeout_s=1e9,
        lease_s=lease_s,
        max_staleness=1000,
        staleness="constant",
        retry_s=10.0,
        server_learning_rate=ETA * (k / K) ** 0.5,
    )


def compared(k: int = K, lease_s: float = LEASE_S) -> Ways:
    """The main comparison, with buffers and rounds of k updates."""
    return {
        BUFFERED: replace(buffers(k, lease_s=lease_s), longer=2),
        SYNCHRONOUS: rounds(k, lease_s=lease_s),
        OVER: rounds(k, OVER_SELECTION, lease_s=lease_s),
        FINISH: rounds(k, partial=True, lease_s=lease_s),
        OVER_FINISH: rounds(k, OVER_SELECTION, partial=True, lease_s=lease_s),
    }


def candidates() -> Ways:
    """What the lease and K were chosen from, on seeds whose clients no result uses."""
    found = {}
    for lease_s in LEASES_S:
        found |= {
            f"{BUFFERED}, lease {lease_s:g}": buffers(lease_s=lease_s),
            f"{SYNCHRONOUS}, lease {lease_s:g}": rounds(lease_s=lease_s),
            f"{FINISH}, lease {lease_s:g}": rounds(lease_s=lease_s, partial=True),
        }
    return found | {f"{FINISH}, K {K // 2}": rounds(K // 2, partial=True)}


def sweep_of_k() -> Ways:
    """Buffers by K."""
    return {str(k): buffers(k) for k in BUFFER_SIZES}


def sweep_of_slots() -> Ways:
    """Buffers by how many devices work at a time."""
    return {str(slots or "all"): buffers(slots=slots) for slots in SLOTS}


def sweep_of_staleness() -> Ways:
    """Buffers by staleness function."""
    return {name: buffers(staleness=name) for name in FUNCTIONS}
