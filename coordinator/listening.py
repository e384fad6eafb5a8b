"""`[serving]`: by which addresses a coordinator is reached, and which proxies before it are believed.

A proxy says in `X-Forwarded-For` who asked it, and anybody may write that header: it counts from the
addresses that the host names, and from nobody else. Of several names in it the last one counts that is not a
trusted proxy's own, for a proxy appends what it saw to whatever it was sent.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from edge_sdk.core.addresses import ip_address, is_local, normal_address
from edge_sdk.core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")
MOST_HOST = 300  # characters of a Host header
MOST_FORWARDED = 2000  # characters of X-Forwarded-For that are looked at, from its end


@dataclass(frozen=True)
class Serving:
    """How the coordinator is reached, as its host says.

    Args:
        public_url: what stands in invitations; otherwise the address that it listens on.
        hosts: names and addresses by which it may be asked without TLS, besides this machine's own.
        trusted_proxies: addresses or networks (10.0.0.0/8) whose word counts about who asks, and how.
        path_prefix: what every route begins with, where a proxy leaves it there.

    Raises:
        InputError: one of them cannot be; names it.
    """

    public_url: str | None = None
    hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    path_prefix: str = ""

    def __post_init__(self) -> None:
        for host in self.hosts:
            if ip_address(host) is None and not _NAME.fullmatch(host):
                raise InputError(f"serving.hosts: {host!r} is not a host; write it without scheme and port")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError as error:
                raise InputError(
                    f"serving.trusted_proxies: {proxy!r} is neither an address nor a network like 10.0.0.0/8"
                ) from error
        if not _PREFIX.fullmatch(self.path_prefix):
            raise InputError(
                f"serving.path_prefix is {self.path_prefix!r}; write it like /federation, or leave it empty"
            )
        if self.public_url is not None:
            try:
                normal_address(self.public_url)
            except InputError as error:
                raise InputError(f"serving.public_url: {error}") from error

    @cached_property
    def _proxies(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        return tuple(ipaddress.ip_network(proxy, strict=False) for proxy in self.trusted_proxies)

    @cached_property
    def _hosts(self) -> frozenset[str]:
        named = [*self.hosts, urlsplit(self.public_url or "").hostname or ""]
        return frozenset(_one_form(host) for host in named if host)

    def trusts(self, address: str) -> bool:
        """Whether somebody at this address is a proxy of the host's."""
        found = ip_address(address)
        return found is not None and any(found in proxy for proxy in self._proxies)

    def client(self, peer: str, forwarded: str) -> str:
        """Who asks: the peer of the connection, or whom a trusted proxy there names.

        Args:
            peer: the address that the connection comes from.
            forwarded: X-Forwarded-For, all of its lines joined by commas.
        """
        client = peer
        for named in reversed(forwarded[-MOST_FORWARDED:].split(",")):
            if not self.trusts(client):
                break
            found = ip_address(_without_port(named.strip()))
            if found is None:
                break
            client = str(found)
        return client

    def is_host(self, name: str, *own: str) -> bool:
        """Whether a Host header names this coordinator; `own`: addresses that it listens on."""
        if len(name) > MOST_HOST:
            return False
        host = _one_form(_without_port(name))
        return is_local(host) or host in self._hosts or any(host == _one_form(one) for one in own if one)


def _without_port(text: str) -> str:
    """A host without its port; IPv6 without its brackets."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text if text.count(":") > 1 else text.partition(":")[0]


@functools.lru_cache(maxsize=1024)  # every request asks
def _one_form(host: str) -> str:
    address = ip_address(host)
    return host.lower().removesuffix(".") if address is None else str(address)
