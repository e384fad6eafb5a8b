"""How fast versions may follow each other: not so fast that most devices are always too late.

A device that hands in zeros needs no time for them. Four of those would make a version at every moment, and
whoever trains in earnest would find its work too old each time. So a version is not made before most of the
active devices have had a fair share of their time since the last one.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from coordinator.engine.policy import Policy

MOST = 0.75  # of the active devices keep up with the versions; the others are told to finish early


@dataclass
class Tempo:
    """Seconds that each active device takes for an assignment. Bounded by the devices that there are.

    Active: it was noted within the time of a lease. What is asked costs no walk through all of them.
    """

    taken: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # device: seconds, noted at; oldest first
    ordered: list[float] = field(default_factory=list)  # the same seconds, rising

    def note(self, device: str, seconds: float, now: float) -> None:
        """A device is active, and takes so long."""
        before = self.taken.pop(device, None)
        self.taken[device] = seconds, now
        if before is None or before[0] != seconds:
            if before is not None:
                self._remove(before[0])
            bisect.insort(self.ordered, seconds)

    def forget(self, device: str) -> None:
        """A device takes part no more."""
        if known := self.taken.pop(device, None):
            self._remove(known[0])

    def least_version_s(self, policy: Policy, now: float) -> float:
        """The least time from one version to the next.

        While a device that is no slower than three quarters of the active ones is at work, the versions that
        may come are no more than make its work too old. The first of them may come right after its grant, so
        that its time is divided by one less than the limit.
        """
        if policy.least_version_s is not None:
            return policy.least_version_s
        if policy.mode == "synchronous":
            return 0.0
        self._forget(now - policy.lease_s)
        if not self.ordered:
            return 0.0
        most_s = self.ordered[math.ceil(MOST * len(self.ordered)) - 1]
        return min(policy.timeout_s, most_s / max(1, policy.staleness_limit - 1))

    def _forget(self, before: float) -> None:
        """Devices that were not heard of since."""
        while self.taken:
            device, (seconds, noted_at) = next(iter(self.taken.items()))
            if noted_at >= before:
                return
            del self.taken[device]
            self._remove(seconds)

    def _remove(self, seconds: float) -> None:
        del self.ordered[bisect.bisect_left(self.ordered, seconds)]
