"""Where a coordinator listens and how: with which certificate, known to devices by which address."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from coordinator.listening import Serving
from coordinator.upkeep.announcement import Announcement
from coordinator.web.tls import Certificate, own_certificate
from edge_sdk.core.addresses import in_url, ip_address, is_local, normal_address
from edge_sdk.core.errors import InputError

EVERYWHERE = ("", "0.0.0.0", "::")
# Where the way out is looked up; nothing is sent. Both are for documentation (RFC 5737, RFC 3849).
_OUT_THERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


@dataclass(frozen=True)
class Endpoint:
    """What `serve` was asked for.

    Args:
        host: to listen on; `port` 0 picks a free one.
        port: likewise.
        cert: a certificate of the host's own, with its chain.
        key: its private key; None if it is in the same file.
        tls: TLS also where it would not be.
        insecure: no TLS where there would be.
        serving: what the configuration says.

    Raises:
        InputError: some of these contradict each other.
    """

    host: str = "127.0.0.1"
    port: int = 0
    cert: Path | None = None
    key: Path | None = None
    tls: bool = False
    insecure: bool = False
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        if self.insecure and (self.cert or self.tls):
            raise InputError(
                f"--insecure means no TLS; leave out {'--cert' if self.cert else '--tls'}, or it"
            )
        if self.key and not self.cert:
            raise InputError("--key is the key of a certificate; give that in --cert")

    @property
    def leaves_machine(self) -> bool:
        """Whether others than this machine may connect."""
        return not is_local(self.host)

    @property
    def for_proxies_only(self) -> bool:
        """Whether what comes over the network in plain HTTP must come from a proxy of the host's."""
        has_tls = self.cert or self.tls
        return (
            self.leaves_machine and not has_tls and not self.insecure and bool(self.serving.trusted_proxies)
        )

    def certificate(self, folder: Path) -> Certificate | None:
        """What to speak TLS with; None for plain HTTP. The coordinator's own is made if there is none.

        Raises:
            InputError: a file cannot be used; names it.
            DiskFull, InternalError: the disk does not take the coordinator's own.
        """
        if self.cert:
            return Certificate(self.cert, self.key or self.cert)
        if self.tls or (self.leaves_machine and not self.insecure and not self.for_proxies_only):
            return own_certificate(folder, self._names())
        return None

    def address(self, port: int, certificate: Certificate | None) -> str:
        """Where it is itself, now that it listens on a port."""
        scheme = "https" if certificate else "http"
        return f"{scheme}://{in_url(self._shown_host())}:{port}{self.serving.path_prefix}"

    def announcement(self, port: int, certificate: Certificate | None) -> Announcement:
        """How devices reach it."""
        url = normal_address(self.serving.public_url or self.address(port, certificate))
        pin = certificate.pin if certificate else ""
        plain = urlsplit(url).scheme == "http" and not is_local(urlsplit(url).hostname or "")
        return Announcement(url, pin if url.startswith("https:") else "", plain)

    def notices(self, certificate: Certificate | None) -> list[str]:
        """What its host should know of it, if anything."""
        if self.serving.trusted_proxies and not self.serving.public_url:
            return ["behind a proxy: put its address into serving.public_url, for invitations to name it"]
        if self.leaves_machine and certificate is None and not self.for_proxies_only:
            return ["plain HTTP to other machines: tokens and adapters can be read on the way"]
        return []

    def _shown_host(self) -> str:
        """The host as others may reach it; where it listens everywhere, its address on the way out."""
        if self.host not in EVERYWHERE:
            return self.host
        family = socket.AF_INET6 if self.host == "::" else socket.AF_INET
        return _way_out(family) or _way_out(socket.AF_INET) or _own_name()

    def _names(self) -> list[str]:
        """What the coordinator's own certificate names."""
        public = urlsplit(self.serving.public_url or "").hostname or ""
        named = [
            self._shown_host(),
            public,
            *self.serving.hosts,
            _own_name(),
            "localhost",
            "127.0.0.1",
            "::1",
        ]
        return [name for name in named if name and (ip_address(name) or name.isascii())]


def _way_out(family: socket.AddressFamily) -> str:
    """This machine's address on the way to others; "" where there is no way."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_OUT_THERE[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _own_name() -> str:
    return platform.node() or "localhost"
