"""The wire: every record, path and header that a device and a coordinator exchange. Nothing else names one.

The type of a field says its range as well (`ranges.py`): a record with a value outside is refused. Which
record goes where, and who may send it, is the table of `routes.py`.

Requests but join carry the device's credential as a bearer token. Every refusal is an RFC 9457 problem
document (`application/problem+json`); `errors.from_problem` rebuilds the error from it. Durations travel in
seconds from receipt, never as clock times, so that no two clocks need to agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.errors import BaseMismatch, ProtocolError
from edge_sdk.core.flexlora import Split
from edge_sdk.core.ranges import (
    Attempt,
    ByteCount,
    Count,
    Credential,
    Decay,
    Digest,
    Factor,
    Id,
    Interval,
    Key,
    Loss,
    Name,
    Rank,
    RankOrNone,
    Run,
    Seconds,
    Seed,
    Several,
    Share,
    Size,
    Start,
    Text,
    Version,
    Width,
)

PROTOCOL_VERSION = 1
MODULES, LADDER, VERSIONS = 1 << 16, 1 << 10, 1 << 10  # the most of each that a record lists

JOIN = "/v1/join"
FEDERATION = "/v1/federation"
ASSIGNMENTS = "/v1/assignments"
HEARTBEAT = "/v1/assignments/{id}/heartbeat"
UPLOAD = "/v1/assignments/{id}/adapter"
UPDATE = "/v1/assignments/{id}/update"
ADAPTER = "/v1/versions/{version}/ranks/{rank}/adapter_model.safetensors"
ADAPTER_IN = "/v1/versions/{version}/ranks/{rank}/{dtype}/adapter.safetensors"
ADAPTER_CONFIG = "/v1/versions/{version}/ranks/{rank}/adapter_config.json"
NEWEST = "/v1/newest"
CREDENTIAL = "/v1/credential"
LEAVE = "/v1/leave"
STATUS = "/v1/status"
OPENAPI = "/v1/openapi.json"

UPLOAD_OFFSET = "Upload-Offset"  # of tus 1.0, with its meaning: bytes stored so far
OFFSET_CONTENT_TYPE = "application/offset+octet-stream"
PROBLEM_CONTENT_TYPE = "application/problem+json"

OWN_RULES = ("flexlora", "innovation", "carry", "fedit", "hetlora", "flora")
"""The merge rules that come with this project. A host may use others: devices need none of a rule's code."""

CARRYING = frozenset({"carry", "flora"})
"""Those of them under which a device holds the global adapter frozen and trains fresh factors on top."""

Directive = Literal["continue", "finish", "abandon"]


@dataclass(frozen=True)
class Base:
    """The frozen LLM that all devices share: where to load it, what it must be, and its LoRA targets."""

    model: Name  # `tiny`, a Hugging Face id or a directory
    fingerprint: Digest  # over config, tokenizer, weights and targets
    modules: Annotated[dict[Key, tuple[Width, Width]], Meta(max_length=MODULES)]  # target module -> (out, in)

    def require(self, fingerprint: str) -> None:
        """Raise BaseMismatch unless a device's base model is this one."""
        if fingerprint != self.fingerprint:
            raise BaseMismatch(
                f"this device's base model has fingerprint {fingerprint[:12]}, the federation trains "
                f"{self.model} with {self.fingerprint[:12]}; load that model"
            )


@dataclass(frozen=True)
class Training:
    """What every device does locally in one assignment."""

    steps: Several = 20  # optimiser steps
    batch: Several = 8  # examples in a step
    sequence_len: Several = 256  # tokens; longer examples are cut
    learning_rate: Factor = 2e-3  # of version 0
    learning_rate_decay: Decay = 1.0  # factor from one version to the next; see `learning_rate_at`
    checkpoint_s: Interval = 30.0  # at most this much work is done again after a crash
    sparse_versions: Version = 0  # versions before this one train whole input columns, as in SLoRA

    def learning_rate_at(self, version: int) -> float:
        """The rate for an assignment from `version`: falling geometrically where devices' texts differ.

        With a constant rate and local steps, averaging over unlike devices stops short of the optimum (Li et
        al., ICLR 2020, arXiv:1907.02189, theorem 4).
        """
        return float(self.learning_rate * self.learning_rate_decay**version)


@dataclass(frozen=True)
class Federation:
    """All that a device needs to take part; fixed for the life of a federation."""

    id: Id
    base: Base
    rule: Name
    ladder: Annotated[tuple[Rank, ...], Meta(max_length=LADDER)]  # ranks that a device may train, rising
    rank_cap: Rank  # rank R of the stored global adapter
    scaling: Factor  # s = lora_alpha / r, the same at every rank
    split: Split
    training: Training = field(default_factory=Training)
    heartbeat_s: Interval = 5.0
    # Ranks (attention, feed-forward) that a device may train besides the ladder: the paper's Type 3.
    mixed_ranks: Annotated[tuple[tuple[Rank, Rank], ...], Meta(max_length=LADDER)] = ()
    lease_s: Interval = field(default=600.0, compare=False)  # time for an assignment; the host may change it
    # How files travel; a device of before these fields, and a data folder, have float32 both ways.
    download_dtype: WireDtype = "float32"
    upload_dtype: WireDtype = "float32"
    protocol: Count = PROTOCOL_VERSION
    # What `carries` says; None in records older than this field, where the name of the rule decides.
    holds_global: bool | None = None

    @property
    def carries(self) -> bool:
        """Whether devices hold the global adapter frozen; otherwise they train a part of it themselves."""
        return self.rule in CARRYING if self.holds_global is None else self.holds_global

    def __post_init__(self) -> None:
        if self.protocol != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the coordinator speaks protocol {self.protocol}, this device {PROTOCOL_VERSION}; "
                "update the older of the two"
            )


@dataclass(frozen=True)
class JoinRequest:
    """A device introduces itself. `profile` is a DeviceProfile as JSON text, for the host's eyes only.

    `attempt`: a secret of the device, the same each time until it has its answer: a join whose answer was
    lost is not another device, and uses an invitation once. "" from a device that has none.
    """

    name: Name
    fingerprint: Digest
    profile: Annotated[dict[Name, Text], Meta(max_length=100)] = field(default_factory=dict)
    protocol: Count = PROTOCOL_VERSION
    attempt: Attempt = ""


@dataclass(frozen=True)
class JoinReply:
    """The device's own credential, shown once and stored hashed by the coordinator."""

    device_id: Id
    credential: Credential
    federation: Federation
    run: Run = ""  # as in Assignment


@dataclass(frozen=True)
class NewCredential:
    """A credential in place of the one that asked for it, which holds until this one is used."""

    credential: Credential


@dataclass(frozen=True)
class Newest:
    """The newest version: its number, its live rank (0: it changes nothing), and `start` as in Assignment."""

    version: Version
    rank: RankOrNone
    start: Start = ""


@dataclass(frozen=True)
class Ask:
    """A device asks for work at the rank it has chosen.

    `carry_rank`: the most components of the global adapter that it can hold frozen beside; 0 for none.
    `run`: the last one that it heard of, as in Assignment; "" for none.
    """

    rank: Rank
    carry_rank: RankOrNone = 0
    run: Run = ""


@dataclass(frozen=True)
class Assignment:
    """A lease: train `steps` steps at `rank` from `version`, within `expires_in_s` of receiving this."""

    id: Id
    version: Version
    rank: Rank
    carry_rank: (
        RankOrNone  # components of `version` to hold frozen, at most those asked for; 0 but for `carry`
    )
    steps: Several
    seed: Seed
    expires_in_s: Seconds
    # The first 16 hex digits of the SHA-256 of the stored global adapter of `version`; "" for version 0.
    # After a restored backup one number may stand for two adapters: files are kept by number and this.
    start: Start = ""
    # Names the start of the coordinator on its folder: how many there were, and a random id, "7-3fa9c2d1".
    run: Run = ""
    # The run that the device asked with is not one of this folder: a copy of that runs, or an older backup.
    elsewhere: bool = False
    renew: bool = False  # the device's credential is old: it asks for another


@dataclass(frozen=True)
class NotNow:
    """No work at present; ask again after `retry_after_s`."""

    retry_after_s: Seconds
    reason: Text
    elsewhere: bool = False  # as in Assignment
    renew: bool = False  # likewise


@dataclass(frozen=True)
class Heartbeat:
    """Progress of an assignment."""

    steps_done: Count


@dataclass(frozen=True)
class HeartbeatReply:
    """Carry on, hand in what there is, or drop it."""

    directive: Directive


@dataclass(frozen=True)
class Update:
    """What an uploaded adapter is. `digest` is the SHA-256 of its bytes in hex."""

    digest: Digest
    size_bytes: ByteCount
    rank: Rank
    examples: Count  # examples processed; the weight n_k of the average
    steps: Count
    loss_before: Loss  # mean training loss of the first step
    loss_after: Loss  # mean training loss of the last step
    train_s: Seconds


@dataclass(frozen=True)
class UpdateReply:
    """The update is on disk and counts exactly once."""

    update_id: Id
    current_version: Version


@dataclass(frozen=True)
class DeviceStatus:
    """One device as the host sees it."""

    id: Id
    name: Name
    rank: RankOrNone
    updates: Count
    mean_staleness: Size
    state: Literal["idle", "training"]
    steps_done: Count
    steps: Count
    seen_s_ago: Seconds


@dataclass(frozen=True)
class Status:
    """The federation at a glance. Its devices come in pages; all else is the same in each."""

    federation: Id
    version: Version
    buffered: Count
    buffer_size: Count
    aggregating: bool
    version_ranks: Annotated[
        dict[Key, RankOrNone], Meta(max_length=VERSIONS)
    ]  # version -> live rank of its global adapter, newest 20
    discarded_shares: Annotated[
        dict[Key, Share], Meta(max_length=VERSIONS)
    ]  # version -> share of its energy that the rank cap dropped, likewise
    devices: tuple[DeviceStatus, ...]
    refused: Count = 0  # adapters that could not be merged, or changed too much
    clipped: Count = 0  # updates of which less than the whole change is merged
    norm_bound: Size | None = None  # the longest change that is merged whole; None while none is learnt
    # Differential privacy of the device whose updates entered most versions so far; delta is 0 without it.
    epsilon: Size = 0.0
    delta: Share = 0.0
    start: Start = ""  # of the newest version, as in Assignment
    # Since the coordinator started: malformed, not authorised, to no path, or otherwise refused.
    bad_requests: Count = 0
    page: Count = 0  # which part of the devices these are, from 0
    pages: Several = 1
