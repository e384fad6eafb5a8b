"""How often a device may take part under differential privacy: once in a version, and so often in all.

Two updates of one device in one version would double what it can move; one version more than its budget
allows would break the promise made to it. Who has no budget left stays out, and the others go on: the bound
holds for each device by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Ration:
    """Versions that the updates of each device may still enter; without a limit where `most` is None."""

    most: int | None = None  # of a device that has entered none
    left: dict[str, int] = field(default_factory=dict)  # of those that have

    def is_spent(self, device: str, pending: int = 0) -> bool:
        """Whether a device has no version left beyond those that `pending` updates of it wait for."""
        left = self.left.get(device, self.most)
        return left is not None and left <= pending

    def spend(self, devices: Iterable[str]) -> None:
        """Updates of these devices are in a published version."""
        for device in devices:
            left = self.left.get(device, self.most)
            if left is not None:
                self.left[device] = left - 1
