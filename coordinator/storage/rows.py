"""What the store keeps, a record for each kind of row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

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


Standing = Literal["waiting", "member", "suspended", "revoked", "left"]
"""Of a device: not approved yet, taking part, held back by the host, put out for good, gone by itself."""


@dataclass(frozen=True)
class NewMember:
    """A device that joins. `invitation`: the id of what let it in; None: the folder's join token.

    `attempt_hash`: of a secret that the device repeats if it gets no answer; None where it sent none.
    """

    id: str
    name: str
    credential_hash: str
    profile: Mapping[str, str]
    standing: Standing = "member"
    invitation: str | None = None
    attempt_hash: str | None = None
    address: str = ""


@dataclass(frozen=True)
class Invitation:
    """What lets devices in until `expires_at`. `uses`: the most of them; None: any number. `used`: so far.

    Times are seconds since 1970 by the host's clock.
    """

    id: str
    description: str
    made_at: float
    expires_at: float
    uses: int | None
    used: int = 0


@dataclass(frozen=True)
class AuditEntry:
    """Something that a host may want to look up: when, what, which device, from where. Holds no secret.

    `times`: how often it happened within a minute.
    """

    at: float  # seconds since 1970
    what: str
    device: str = ""
    address: str = ""
    detail: str = ""
    times: int = 1


@dataclass(frozen=True)
class Device:
    """An enrolled device. Times are seconds since 1970; `seen_at` may be a minute old."""

    id: str
    name: str
    rank: int
    updates: int
    mean_staleness: float
    refused: int
    standing: Standing = "member"
    refused_why: str = ""  # the last of those
    joined_at: float = 0.0
    seen_at: float | None = None
    address: str = ""
