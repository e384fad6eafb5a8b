"""The host's choices on rounds, buffers, leases and staleness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_sdk.core import staleness
from edge_sdk.core.errors import InputError


@dataclass(frozen=True)
class Policy:
    """The host's choices. Times in seconds, ranks and sizes in counts."""

    mode: Literal["buffered", "synchronous"] = "buffered"
    buffer_size: int = 4  # K: updates that make a version; in synchronous mode the size of a round
    quorum: int = 1  # updates that suffice once timeout_s has passed
    timeout_s: float = 60.0  # T, from the first update in the buffer
    max_staleness: int = 10  # versions; an older update is refused
    staleness: staleness.Name = "polynomial"
    server_learning_rate: float = 1.0  # η
    lease_s: float = 600.0
    retry_s: float = 2.0  # how soon a device without work asks again
    max_examples: int = 10_000  # cap on the self-reported weight n_k

    def __post_init__(self) -> None:
        positive = (
            "buffer_size",
            "quorum",
            "timeout_s",
            "server_learning_rate",
            "lease_s",
            "retry_s",
            "max_examples",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"policy.{name} is {getattr(self, name)}; it must be above 0")
        if self.max_staleness < 0:
            raise InputError(f"policy.max_staleness is {self.max_staleness}; it must be 0 or more")
        if self.quorum > self.buffer_size:
            raise InputError(f"policy.quorum is {self.quorum}, above policy.buffer_size {self.buffer_size}")
