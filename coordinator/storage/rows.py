"""What the store keeps, a record for each kind of row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from edge_sdk.core.errors import InternalError, ProtocolError
from edge_sdk.core.messages import Update
from edge_sdk.core.records import decode

Record = TypeVar("Record")


def record_of(kind: type[Record], text: str) -> Record:
    """The record that a row holds as JSON.

    Raises:
        InternalError: it is none; the row was damaged, or is from before the record's type had ranges.
    """
    try:
        return decode(kind, text)
    except (ValueError, ProtocolError) as error:
        raise InternalError(
            f"a record in the database is damaged ({error}); its host must restore the folder from a backup"
        ) from error


@dataclass(frozen=True)
class StoredUpdate:
    """An acknowledged update: id (that of its assignment), device, version it started from, and record.

    `factor`: by which the device's change is merged, below 1 where it was clipped. `norm`: of that; None for
    an update from before norms were kept.
    """

    id: str
    device: str
    version: int
    update: Update
    factor: float = 1.0
    norm: float | None = None


@dataclass(frozen=True)
class Version:
    """A published global adapter. `digest` names its blob; energies are sums of σ² over all modules.

    `noise_multiplier` and `clip_norm` are those of differential privacy, 0 without it. `norm_bound`: the
    learnt bound that its updates were merged within; None while none was known. `reverts_to`: the
    version whose content it has because the host wanted that. `collected`: its blob is
    gone, because nobody may need it any more.
    """

    version: int
    digest: str
    rank: int  # live rank
    energy: float
    discarded_energy: float
    published_at: float
    noise_multiplier: float = 0.0
    clip_norm: float = 0.0
    norm_bound: float | None = None
    reverts_to: int | None = None
    collected: bool = False

    @property
    def discarded_share(self) -> float:
        """What the rank cap dropped, as a share of the energy of the sum."""
        return self.discarded_energy / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class Run:
    """A start of a coordinator on this folder. `place`: which folder on which machine that was, in words."""

    number: int  # the first is 1
    id: str  # random, so that two copies of a folder do not begin the same run
    place: str

    @property
    def name(self) -> str:
        """What devices call it: `7-3fa9c2d1`."""
        return f"{self.number}-{self.id}"


@dataclass(frozen=True)
class Device:
    """An enrolled device."""

    id: str
    name: str
    rank: int
    updates: int
    mean_staleness: float
    refused: int
