"""`[limits]`: the most that strangers and members may cost, whatever they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from edge_sdk.core.errors import InputError
from edge_sdk.core.ranges import ByteCount, Interval, Several

Percent = Annotated[float, Meta(ge=0, le=90)]
Page = Annotated[int, Meta(ge=1, le=1000)]  # a thousand devices are some 300 KB
REQUESTS_S = 20.0
NAT_SHARE = 0.75  # of all connections one address may have: ten thousand devices behind one router


@dataclass(frozen=True)
class Limits:
    """The host's choices; docs/LIMITS.md has them as a table. None: as the machine allows.

    The defaults are for a federation of ten thousand devices, all of them behind one address.

    Raises:
        InputError: two that contradict each other; names both.
    """

    devices: Several = 20_000  # enrolled and not revoked
    profile_bytes: ByteCount = 4096  # of what a device says of its machine when it joins
    joins_minute: Several = 600
    joins_minute_of_address: Several = 300
    requests_s: Interval | None = None  # of one device, on average over ten seconds; None: `requests_with`
    refusals_s: Interval = 5.0  # of one address, likewise; beyond that the answers come a second late
    uploads_of_device: Several = 2  # at a time
    wasted_uploads_hour: Several = 4  # a device that hands in nothing may send as many bytes as so many take
    least_free_bytes: ByteCount | None = None  # of the disk; None: a twentieth of it, 1 GB at the most
    status_devices: Page = 500  # in one page of the status
    connections: Several | None = None  # at a time; None: as many as there are files for
    connections_of_address: Several | None = None  # None: three quarters of all; this machine's: no limit
    answer_s: Interval = 30.0  # an answer of which nothing is taken for so long is cut

    def __post_init__(self) -> None:
        pairs = (("joins_minute_of_address", "joins_minute"), ("connections_of_address", "connections"))
        for of_one, of_all in pairs:
            one, most = getattr(self, of_one), getattr(self, of_all)
            if one is not None and most is not None and one > most:
                raise InputError(f"limits.{of_one} is {one}, above limits.{of_all} {most}")

    def require_room_for(self, buffer_size: int, heartbeat_s: float) -> None:
        """Raise InputError where a federation of this kind could not live within the limits."""
        if self.devices < buffer_size:
            raise InputError(
                f"limits.devices is {self.devices}, but a version wants updates of policy.buffer_size "
                f"{buffer_size} devices"
            )
        if self.requests_s is not None and self.requests_s * heartbeat_s < 1.0:
            raise InputError(
                f"limits.requests_s is {self.requests_s:g}, but a device has a heartbeat every "
                f"federation.heartbeat_s of {heartbeat_s:g} s; raise one of them"
            )

    def requests_with(self, heartbeat_s: float) -> float:
        """Requests a second of a device: what the host says, or 20, or four to a heartbeat if more."""
        return self.requests_s or max(REQUESTS_S, 4.0 / heartbeat_s)

    def connections_within(self, files: int | None) -> tuple[int, int]:
        """Connections at a time, and of one address, where the process may open so many files.

        Args:
            files: None for no limit.

        Raises:
            InputError: the host wants more than that leaves room for.
        """
        room = NO_LIMIT if files is None else files - min(MOST_KEPT_FILES, files // 2)
        if self.connections is not None and self.connections > room:
            raise InputError(
                f"limits.connections is {self.connections}, but of {files} open files {room} can be "
                "connections; raise `ulimit -Hn`"
            )
        most = self.connections or room
        of_address = self.connections_of_address or max(1, int(NAT_SHARE * most))
        if of_address > most:
            raise InputError(
                f"limits.connections_of_address is {of_address}, but there can be {most} connections in all"
            )
        return most, of_address


MOST_KEPT_FILES = 1024  # of those that a process may open, for the database, uploads and downloads
NO_LIMIT = 1 << 20
