"""Where a request comes from."""

from __future__ import annotations

import ipaddress

from aiohttp import web


def client_address(request: web.BaseRequest) -> str:
    """The address that a request came from."""
    return request.remote or "unknown"


def network_of(address: str) -> str:
    """What one customer of a provider has: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return address
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


def is_loopback(address: str) -> bool:
    """Whether it is this machine's own: of a proxy before the coordinator, perhaps, or of a tunnel."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
