"""The wire: every record, path and header that a device and a coordinator exchange. Nothing else names one.

Which record goes where, and who may send it, is the table of `routes.py`.

Requests but join carry the device's credential as a bearer token. Every refusal is an RFC 9457 problem
document (`application/problem+json`); `errors.from_problem` rebuilds the error from it. Durations travel in
seconds from receipt, never as clock times, so that no two clocks need to agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.errors import BaseMismatch, ProtocolError
from edge_sdk.core.flexlora import Split

PROTOCOL_VERSION = 1

JOIN = "/v1/join"
FEDERATION = "/v1/federation"
ASSIGNMENTS = "/v1/assignments"
HEARTBEAT = "/v1/assignments/{id}/heartbeat"
UPLOAD = "/v1/assignments/{id}/adapter"
UPDATE = "/v1/assignments/{id}/update"
ADAPTER = "/v1/versions/{version}/ranks/{rank}/adapter_model.safetensors"
ADAPTER_IN = "/v1/versions/{version}/ranks/{rank}/{dtype}/adapter.safetensors"
ADAPTER_CONFIG = "/v1/versions/{version}/ranks/{rank}/adapter_config.json"
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

    model: str  # `tiny`, a Hugging Face id or a directory
    fingerprint: str  # over config, tokenizer, weights and targets
    modules: dict[str, tuple[int, int]]  # target module -> (out, in)

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

    steps: int = 20  # optimiser steps
    batch: int = 8  # examples in a step
    sequence_len: int = 256  # tokens; longer examples are cut
    learning_rate: float = 2e-3  # of version 0
    learning_rate_decay: float = 1.0  # factor from one version to the next; see `learning_rate_at`
    checkpoint_s: float = 30.0  # at most this much work is done again after a crash
    sparse_versions: int = 0  # versions before this one train whole input columns, as in SLoRA

    def learning_rate_at(self, version: int) -> float:
        """The rate for an assignment from `version`: falling geometrically where devices' texts differ.

        With a constant rate and local steps, averaging over unlike devices stops short of the optimum (Li et
        al., ICLR 2020, arXiv:1907.02189, theorem 4).
        """
        return float(self.learning_rate * self.learning_rate_decay**version)


@dataclass(frozen=True)
class Federation:
    """All that a device needs to take part; fixed for the life of a federation."""

    id: str
    base: Base
    rule: str
    ladder: tuple[int, ...]  # ranks that a device may train, rising
    rank_cap: int  # rank R of the stored global adapter
    scaling: float  # s = lora_alpha / r, the same at every rank
    split: Split
    training: Training = field(default_factory=Training)
    heartbeat_s: float = 5.0
    # Ranks (attention, feed-forward) that a device may train besides the ladder: the paper's Type 3.
    mixed_ranks: tuple[tuple[int, int], ...] = ()
    lease_s: float = field(default=600.0, compare=False)  # time for an assignment; the host may change it
    # How files travel; a device of before these fields, and a data folder, have float32 both ways.
    download_dtype: WireDtype = "float32"
    upload_dtype: WireDtype = "float32"
    protocol: int = PROTOCOL_VERSION
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
    """A device introduces itself. `profile` is a DeviceProfile as JSON text, for the host's eyes only."""

    name: str
    fingerprint: str
    profile: dict[str, str] = field(default_factory=dict)
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class JoinReply:
    """The device's own credential, shown once and stored hashed by the coordinator."""

    device_id: str
    credential: str
    federation: Federation


@dataclass(frozen=True)
class Ask:
    """A device asks for work at the rank it has chosen.

    `carry_rank`: the most components of the global adapter that it can hold frozen beside; 0 for none.
    """

    rank: int
    carry_rank: int = 0


@dataclass(frozen=True)
class Assignment:
    """A lease: train `steps` steps at `rank` from `version`, within `expires_in_s` of receiving this."""

    id: str
    version: int
    rank: int
    carry_rank: int  # components of `version` to hold frozen, at most those asked for; 0 but for `carry`
    steps: int
    seed: int
    expires_in_s: float
    # The first 16 hex digits of the SHA-256 of the stored global adapter of `version`; "" for version 0.
    # After a restored backup one number may stand for two adapters: files are kept by number and this.
    start: str = ""


@dataclass(frozen=True)
class NotNow:
    """No work at present; ask again after `retry_after_s`."""

    retry_after_s: float
    reason: str


@dataclass(frozen=True)
class Heartbeat:
    """Progress of an assignment."""

    steps_done: int


@dataclass(frozen=True)
class HeartbeatReply:
    """Carry on, hand in what there is, or drop it."""

    directive: Directive


@dataclass(frozen=True)
class Update:
    """What an uploaded adapter is. `digest` is the SHA-256 of its bytes in hex."""

    digest: str
    size_bytes: int
    rank: int
    examples: int  # examples processed; the weight n_k of the average
    steps: int
    loss_before: float  # mean training loss of the first step
    loss_after: float  # mean training loss of the last step
    train_s: float


@dataclass(frozen=True)
class UpdateReply:
    """The update is on disk and counts exactly once."""

    update_id: str
    current_version: int


@dataclass(frozen=True)
class DeviceStatus:
    """One device as the host sees it."""

    id: str
    name: str
    rank: int
    updates: int
    mean_staleness: float
    state: Literal["idle", "training"]
    steps_done: int
    steps: int
    seen_s_ago: float


@dataclass(frozen=True)
class Status:
    """The federation at a glance."""

    federation: str
    version: int
    buffered: int
    buffer_size: int
    aggregating: bool
    version_ranks: dict[str, int]  # version -> live rank of its global adapter, newest 20
    discarded_shares: dict[str, float]  # version -> share of its energy that the rank cap dropped, likewise
    devices: tuple[DeviceStatus, ...]
    refused: int = 0  # adapters that could not be merged, or changed too much
    clipped: int = 0  # updates of which less than the whole change is merged
    norm_bound: float | None = None  # the longest change that is merged whole; None while none is learnt
    # Differential privacy of the device whose updates entered most versions so far; delta is 0 without it.
    epsilon: float = 0.0
    delta: float = 0.0
    start: str = ""  # of the newest version, as in Assignment
