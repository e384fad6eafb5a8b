"""The host's choices on rounds, buffers, leases and staleness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coordinator.engine.weights import Discount
from edge_sdk.core.errors import InputError

LEAST_STALENESS = 10  # where the host names no max_staleness and versions are slower than leases


@dataclass(frozen=True)
class Policy:
    """The host's choices. Times in seconds, ranks and sizes in counts.

    Raises:
        InputError: a value that makes no sense, by itself or beside the others; names the key.
    """

    mode: Literal["buffered", "synchronous"] = "buffered"
    buffer_size: int = 4  # K: updates that make a version; in synchronous mode the size of a round
    quorum: int = 1  # updates that suffice once timeout_s has passed
    timeout_s: float = 60.0  # T, from the first update in the buffer
    least_version_s: float | None = None  # from one version to the next; 0: none. None: see `tempo`
    over_selection: float = 0.0  # synchronous: so many more devices than K are given work, as a share of K
    concurrency: int | None = None  # the most leases at a time; None: no limit
    max_staleness: int | None = None  # versions; an older update is refused. None: see `staleness_limit`
    staleness: Discount = "polynomial"
    server_learning_rate: float = 1.0  # η
    lease_s: float = 600.0  # the most time for an assignment, and what a device with a short past gets
    first_lease_s: float = 60.0  # what a device that has handed in nothing yet gets, until it shows progress
    deadline_mads: float = 6.0  # k: a device with a past gets the median + k·MAD of what it took
    work_s: float | None = None  # sized work: what an assignment should take at most; None: steps for all
    retry_s: float = 2.0  # how soon a device without work asks again, if few do
    max_examples: int = 10_000  # cap on the self-reported weight n_k

    def __post_init__(self) -> None:
        positive = (
            "buffer_size",
            "quorum",
            "timeout_s",
            "concurrency",
            "server_learning_rate",
            "lease_s",
            "first_lease_s",
            "deadline_mads",
            "work_s",
            "retry_s",
            "max_examples",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"policy.{name} is {value}; it must be above 0")
        if self.quorum > self.buffer_size:
            raise InputError(f"policy.quorum is {self.quorum}, above policy.buffer_size {self.buffer_size}")
        self._check_staleness()
        self._check_places()
        self._check_least_version()

    def _check_staleness(self) -> None:
        """A device that keeps its deadline must not be refused for it."""
        if self.max_staleness is None or self.mode == "synchronous":
            return
        if self.max_staleness < 0:
            raise InputError(f"policy.max_staleness is {self.max_staleness}; it must be 0 or more")
        if self.max_staleness < self._implied_staleness():
            raise InputError(
                f"policy.max_staleness is {self.max_staleness}, but while a device uses its policy.lease_s "
                f"of {self.lease_s:g} s, {self._implied_staleness()} versions may come, one every "
                f"policy.timeout_s of {self.timeout_s:g} s; raise max_staleness to that, leave it out, or "
                "shorten lease_s"
            )

    def _check_places(self) -> None:
        """As many devices must be at work at a time as a round waits for."""
        if self.over_selection < 0 or not math.isfinite(self.over_selection):
            raise InputError(f"policy.over_selection is {self.over_selection}; it must be 0 or more")
        if self.over_selection and self.mode != "synchronous":
            raise InputError(
                "policy.over_selection is for synchronous rounds; with buffers set policy.concurrency"
            )
        if self.mode == "synchronous" and self.concurrency and self.concurrency < self.round_size:
            raise InputError(
                f"policy.concurrency is {self.concurrency}, but a round gives work to "
                f"{self.round_size} devices"
            )

    def _check_least_version(self) -> None:
        """A time that there can be, and versions that need one."""
        least_s = self.least_version_s
        if least_s is None:
            return
        if least_s < 0 or not math.isfinite(least_s):
            raise InputError(f"policy.least_version_s is {least_s}; it must be 0 or more")
        if least_s and self.mode == "synchronous":
            raise InputError("policy.least_version_s is for buffers; a round waits for its devices anyway")

    def _implied_staleness(self) -> int:
        """Versions that may come by time-out while a device uses its whole lease."""
        return int(self.lease_s // self.timeout_s)

    @property
    def staleness_limit(self) -> int:
        """The largest staleness that merges: what the host says, or what the deadlines imply, at least 10."""
        if self.mode == "synchronous":
            return 0
        if self.max_staleness is None:
            return max(LEAST_STALENESS, self._implied_staleness())
        return self.max_staleness

    @property
    def new_lease_s(self) -> float:
        """What a device that has handed in nothing yet gets, and gets again with every sign of progress."""
        return min(self.first_lease_s, self.lease_s)

    @property
    def round_size(self) -> int:
        """Devices that a synchronous round gives work to (Bonawitz et al. 2019, arXiv:1902.01046)."""
        return math.ceil(self.buffer_size * (1 + self.over_selection) - 1e-9)
