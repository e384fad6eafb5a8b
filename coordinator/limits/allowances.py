"""What each device and each address may still ask for, by the host's limits."""

from __future__ import annotations

import time
from collections.abc import Callable

from coordinator.limits.bucket import Buckets
from coordinator.limits.limits import Limits
from edge_sdk.core.errors import FederationFull, TooLarge, TooOften

BURST_S = 10.0  # requests that a device has not made for so long it may make at once
MINUTE_S, HOUR_S = 60.0, 3600.0
BEGUN_SHARE = 1 / 8  # of an upload: what one costs that has hardly a byte, a file and a row
ALL = ""  # the key of a bucket for everybody


class Allowances:
    """Counts what was used. Belongs to one event loop.

    Args:
        limits: the host's.
        heartbeat_s: from one heartbeat of a device to the next.
        clock: seconds that never go backwards.
    """

    def __init__(
        self, limits: Limits, heartbeat_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self._requests_s = limits, limits.requests_with(heartbeat_s)
        most, per_address = limits.joins_minute, limits.joins_minute_of_address
        self._joins = Buckets(most, most / MINUTE_S, clock)
        self._joins_of_address = Buckets(per_address, per_address / MINUTE_S, clock)
        self._requests = Buckets(BURST_S * self._requests_s, self._requests_s, clock)
        self._refusals = Buckets(BURST_S * limits.refusals_s, limits.refusals_s, clock)
        wasted = limits.wasted_uploads_hour
        self._uploads = Buckets(wasted, wasted / HOUR_S, clock)

    def join(self, network: str, devices: int, profile_bytes: int) -> None:
        """Count a device that wants to join.

        Args:
            network: of the address that it comes from.
            devices: that are enrolled, or are joining.
            profile_bytes: of what it says of its machine.

        Raises:
            TooLarge: its profile is.
            FederationFull: there is no place for another device.
            TooOften: too many join at a time.
        """
        limits = self.limits
        if profile_bytes > limits.profile_bytes:
            raise TooLarge(
                f"JoinRequest.profile takes {profile_bytes} bytes; {limits.profile_bytes} are allowed"
            )
        if devices >= limits.devices:
            raise FederationFull(
                f"this federation has {devices} devices, as many as its host lets in (limits.devices)"
            )
        # Of its own first: an address that joins too often must use up nothing of what is for all.
        if wait_s := self._joins_of_address.take(network) or self._joins.take(ALL):
            raise TooOften("too many devices join at a time; try again later", retry_after_s=wait_s)

    def request(self, device: str) -> None:
        """Count a request of a device; raise TooOften for one more than it may make."""
        if wait_s := self._requests.take(device):
            raise TooOften(
                f"this device asks more than {self._requests_s:g} times a second; ask less often",
                retry_after_s=wait_s,
            )

    def is_flooding(self, network: str) -> bool:
        """Count a request that did nothing for anybody; whether they come too fast from that address."""
        return self._refusals.take(network) > 0.0

    def require_useful(self, device: str) -> None:
        """Raise TooOften for a device that has sent much, and has handed in nothing of it."""
        if wait_s := self._uploads.wait_s(device):
            raise TooOften(
                f"this device has uploaded {self.limits.wasted_uploads_hour} adapters within an hour, and "
                "handed in none of them",
                retry_after_s=wait_s,
            )

    def uploaded(self, device: str, share: float, begins: bool) -> None:
        """Count bytes of an upload, as a share of the most that it may have; and that it begins with them."""
        self._uploads.charge(device, share + BEGUN_SHARE * begins)

    def handed_in(self, device: str) -> None:
        """What the device had uploaded was of use."""
        self._uploads.fill(device)
