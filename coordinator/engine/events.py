"""What happens to the engine, what it answers, and what it wants done: records without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

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
    granted_at: float = 0.0  # of before a restart: as long ago as the host's clock says
    has_sent: bool = False  # a byte of its update has arrived


@dataclass(frozen=True)
class Buffered:
    """An update on disk that is in no version yet."""

    update: str
    device: str
    version: int  # it was trained from this one
    examples: int


# --- answers to whoever brought the event ---


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
class Accept:
    """The offered adapter can be merged: check it, store it and acknowledge it."""


@dataclass(frozen=True)
class Decline:
    """This update is in no version, now or later, for this reason; if it is stored, it is left out."""

    update: str
    error: StaleUpdate


Answer_co = TypeVar("Answer_co", covariant=True)


class Event(Generic[Answer_co]):
    """Something that happens to the engine. The parameter says what it is answered with; None for nothing."""


# --- events of one device ---


@dataclass(frozen=True)
class Joined(Event[None]):
    """A device is new here."""

    device: str


@dataclass(frozen=True)
class Asked(Event[Grant | Wait]):
    """A device wants work. `assignment` is a fresh random id to use if it is granted."""

    device: str
    rank: int
    assignment: str
    carry_rank: int = 0  # the most that it can hold frozen


@dataclass(frozen=True)
class Beat(Event[Tell]):
    """A device reports progress on an assignment from `version`."""

    device: str
    assignment: str
    version: int
    steps_done: int


@dataclass(frozen=True)
class BytesArrived(Event[None]):
    """A piece of the adapter of an assignment is stored."""

    device: str
    assignment: str
    size_bytes: int


@dataclass(frozen=True)
class Offered(Event[Accept | Decline]):
    """A device says that the adapter of an assignment from `version` is whole; it is not acknowledged yet."""

    device: str
    assignment: str
    version: int


@dataclass(frozen=True)
class Stored(Event[Decline | None]):
    """An update is on disk, and counts unless it is declined.

    `steps`: how many it was trained for; 0: all that were asked for.
    """

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

    @property
    def version(self) -> int:
        """The version that it was trained from."""
        return self.update.version


@dataclass(frozen=True)
class Refused(Event[None]):
    """What a device handed in for an assignment is no adapter that can be merged."""

    device: str
    assignment: str


@dataclass(frozen=True)
class Barred(Event[None]):
    """The host lets a device take part no more: what it holds ends, what waits of it is left out."""

    device: str


# --- events of the federation ---


@dataclass(frozen=True)
class Tick(Event[None]):
    """Time passed."""


@dataclass(frozen=True)
class Merged(Event[None]):
    """The merge that was asked for is on disk as `version`, of live rank `rank`.

    `reverts_to`: it has the content of that older version, and those in between are taken back; None: it is
    merged from updates.
    """

    version: int
    rank: int
    reverts_to: int | None = None


@dataclass(frozen=True)
class MergeFailed(Event[None]):
    """The merge could not be done now; `rejected` updates are to be left out of the next try.

    With none rejected the fault is ours, a full disk say, and the next try waits longer each time.
    """

    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class RevertWanted(Event[None]):
    """The host wants a version with the content of version `to`. Said again until it is there."""

    to: int


@dataclass(frozen=True)
class Restarted(Event[None]):
    """The coordinator began, with what the disk remembers. Leases are by the clock of this run."""

    version: int = 0
    rank: int = 0
    leases: tuple[Lease, ...] = ()
    buffer: tuple[Buffered, ...] = ()  # oldest first
    contributed: tuple[tuple[str, int], ...] = ()  # device, newest version that an update of it is from
    paces_s: tuple[tuple[str, tuple[float, ...]], ...] = ()  # device, seconds a step, oldest first
    newest: tuple[tuple[str, str], ...] = ()  # device, the assignment that was granted to it last
    taken_back: tuple[tuple[int, int], ...] = ()  # (to, version) of versions that reverted, any order


VersionedEvent = Beat | Offered | Stored
"""About work that began from a version which the event names."""

WorkEvent = VersionedEvent | BytesArrived | Refused
"""About one assignment of one device."""

DeviceEvent = WorkEvent | Joined | Asked | Barred
VersionEvent = Tick | Merged | MergeFailed | RevertWanted | Restarted
"""About a version in the making."""

# --- effects ---


@dataclass(frozen=True)
class Expired:
    """A lease is over, and its slot is free. The update may still come."""

    lease: Lease


@dataclass(frozen=True)
class Merge:
    """Combine these updates into `version`. Weights are n_k·s(τ_k), normalised to 1; τ beside each.

    Under a ration they are s(τ_k)/K instead, whatever the devices say and however many they are.
    """

    version: int
    weights: tuple[tuple[Buffered, float, int], ...]


@dataclass(frozen=True)
class Revert:
    """Make `version` with the content of version `to`, which is older."""

    version: int
    to: int


@dataclass(frozen=True)
class Published:
    """`version` is the current one from now on."""

    version: int


Effect = Expired | Decline | Merge | Revert | Published
"""What is to be done because of an event, whoever brought it. Decline: of what was taken in before."""


@dataclass(frozen=True)
class Done(Generic[Answer_co]):
    """What an event came to: the answer to whoever brought it, and what is to be done, in order."""

    answer: Answer_co
    effects: tuple[Effect, ...] = ()
