"""What happens to the engine, and what it answers: records without behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.core.errors import StaleUpdate
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
    steps: int = 1  # that were asked for
    steps_done: int = 0
    granted_at: float | None = None  # None: before a restart, by another clock


@dataclass(frozen=True)
class Buffered:
    """An update on disk that is in no version yet."""

    update: str
    device: str
    version: int  # that it was trained from
    examples: int


# --- events of one device ---


@dataclass(frozen=True)
class Joined:
    """A device is new here."""

    device: str


@dataclass(frozen=True)
class Asked:
    """A device wants work. `assignment` is a fresh random id to use if it is granted."""

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
class BytesArrived:
    """A piece of the adapter of an assignment is stored."""

    device: str
    assignment: str
    size_bytes: int


@dataclass(frozen=True)
class Offered:
    """A device says that the adapter of an assignment from `version` is whole; it is not acknowledged yet."""

    device: str
    assignment: str
    version: int


@dataclass(frozen=True)
class Stored:
    """An update is on disk. `steps`: that it was trained for; 0: all that were asked for."""

    update: Buffered
    steps: int = 0

    @property
    def device(self) -> str:
        """Whose it is."""
        return self.update.device

    @property
    def assignment(self) -> str:
        """What it was trained for."""
        return self.update.update


@dataclass(frozen=True)
class Refused:
    """What a device handed in for an assignment is no adapter that can be merged."""

    device: str
    assignment: str


# --- events of the federation ---


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

    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restarted:
    """The coordinator began, with what the disk remembers. Leases are by the clock of this run."""

    version: int = 0
    rank: int = 0
    leases: tuple[Lease, ...] = ()
    buffer: tuple[Buffered, ...] = ()  # oldest first
    contributed: tuple[tuple[str, int], ...] = ()  # device, newest version that an update of it is from
    paces_s: tuple[tuple[str, tuple[float, ...]], ...] = ()  # device, seconds a step, oldest first


DeviceEvent = Joined | Asked | Beat | BytesArrived | Offered | Stored | Refused
Event = DeviceEvent | Tick | Merged | MergeFailed | Restarted

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
    """A lease is over, and its slot is free. The update may still come."""

    lease: Lease


@dataclass(frozen=True)
class Accept:
    """The offered adapter can be merged: check it, store it and acknowledge it."""


@dataclass(frozen=True)
class Decline:
    """This update is in no version, now or later, for this reason; if it is stored, it is left out."""

    update: str
    error: StaleUpdate


@dataclass(frozen=True)
class Merge:
    """Combine these updates into `version`. Weights are n_k·s(τ_k), normalised to 1; τ beside each.

    Under a ration they are s(τ_k)/K instead, whatever the devices say and however many they are.
    """

    version: int
    weights: tuple[tuple[Buffered, float, int], ...]


@dataclass(frozen=True)
class Published:
    """`version` is the current one from now on."""

    version: int


Effect = Grant | Wait | Tell | Expired | Accept | Decline | Merge | Published
