"""What happens to the engine, and what it answers: records without behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.core.messages import Directive


@dataclass
class Lease:
    """Work that a device holds. It frees its slot at `expires_at`; its late update may still count."""

    assignment: str
    device: str
    version: int
    rank: int
    expires_at: float
    carry_rank: int = 0  # components of the global adapter at `version` that the device holds frozen
    steps_done: int = 0


@dataclass(frozen=True)
class Buffered:
    """An update on disk that is in no version yet."""

    update: str
    device: str
    version: int  # that it was trained from
    examples: int


# --- events ---


@dataclass(frozen=True)
class Asked:
    """A device wants work. `assignment` is a fresh id to use if it is granted."""

    device: str
    rank: int
    assignment: str
    carry_rank: int = 0  # the most that it can hold frozen


@dataclass(frozen=True)
class Beat:
    """A device reports progress on an assignment from `version`."""

    device: str
    assignment: str
    version: int
    steps_done: int


@dataclass(frozen=True)
class Stored:
    """An update is on disk and acknowledged."""

    update: Buffered


@dataclass(frozen=True)
class Refused:
    """What a device handed in for an assignment is no adapter that can be merged."""

    device: str
    assignment: str


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Merged:
    """The merge that was asked for is on disk as `version`, of live rank `rank`."""

    version: int
    rank: int


@dataclass(frozen=True)
class MergeFailed:
    """The merge could not be done now; `rejected` updates are to be left out of the next try.

    With none rejected the fault is ours, a full disk say, and the next try waits longer each time.
    """

    rejected: tuple[str, ...]


Event = Asked | Beat | Stored | Refused | Tick | Merged | MergeFailed

# --- effects ---


@dataclass(frozen=True)
class Grant:
    """Hand this lease to its device: a new one, or the one that it holds already."""

    lease: Lease


@dataclass(frozen=True)
class Wait:
    """No work now."""

    retry_after_s: float
    reason: str


@dataclass(frozen=True)
class Tell:
    """Answer a heartbeat."""

    directive: Directive


@dataclass(frozen=True)
class Expired:
    """A lease ran out."""

    lease: Lease


@dataclass(frozen=True)
class Merge:
    """Combine these updates into `version`. Weights are n_k·s(τ_k), normalised to 1; τ beside each.

    Under a ration they are s(τ_k)/K instead, whatever the devices say and however many they are.
    """

    version: int
    weights: tuple[tuple[Buffered, float, int], ...]


Effect = Grant | Wait | Tell | Expired | Merge
