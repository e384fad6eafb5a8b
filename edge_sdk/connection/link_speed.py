"""How fast this device's link to its coordinator is, from the transfers that happen anyway.

The rate of a direction is the lower median of its last five transfers: one transfer that stalled, or that a
cache answered, changes nothing, and a link that has changed shows within three. Short transfers measure
latency, not throughput, and are left out; so are those that broke off, of which nobody knows what arrived.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from edge_sdk.core.errors import ProtocolError, Unwritable
from edge_sdk.core.records import decode, encode
from edge_sdk.system.durable import write_durably
from edge_sdk.system.terminal import logger

log = logger("edge_sdk")

KEPT = 5
LEAST_BYTES = 64 << 10  # a connection sends about 14 kB before the first answer (RFC 6928)


@dataclass(frozen=True)
class LinkSpeed:
    """The last transfers of each direction, in bytes a second, oldest first."""

    uploads: tuple[float, ...] = ()
    downloads: tuple[float, ...] = ()

    @property
    def upload_bytes_s(self) -> float | None:
        """Bytes a second towards the coordinator; None: not measured."""
        return statistics.median_low(self.uploads) if self.uploads else None

    @property
    def download_bytes_s(self) -> float | None:
        """Bytes a second from the coordinator; None: not measured."""
        return statistics.median_low(self.downloads) if self.downloads else None

    def with_upload(self, size_bytes: int, seconds: float) -> LinkSpeed:
        """This link after one more upload."""
        return replace(self, uploads=_added(self.uploads, size_bytes, seconds))

    def with_download(self, size_bytes: int, seconds: float) -> LinkSpeed:
        """This link after one more download."""
        return replace(self, downloads=_added(self.downloads, size_bytes, seconds))


def _added(rates: tuple[float, ...], size_bytes: int, seconds: float) -> tuple[float, ...]:
    """The last KEPT rates, with this transfer if it says something about throughput."""
    if size_bytes < LEAST_BYTES or seconds <= 0:
        return rates
    return (*rates, size_bytes / seconds)[-KEPT:]


def load_link(path: Path) -> LinkSpeed:
    """What was measured before. A missing or damaged file only means that it is measured anew."""
    try:
        link = decode(LinkSpeed, path.read_bytes())
    except (OSError, ValueError, ProtocolError):
        return LinkSpeed()
    good = all(rate > 0 for rate in link.uploads + link.downloads)
    return LinkSpeed(link.uploads[-KEPT:], link.downloads[-KEPT:]) if good else LinkSpeed()


def save_link(path: Path, link: LinkSpeed) -> None:
    """Keep it for the next start. A disk that is full must not end a transfer that went well."""
    try:
        write_durably(path, encode(link))
    except Unwritable as error:
        log.warning("%s; the link is measured anew next time", error)
