"""What is counted as one sender, where limits go by address."""

from __future__ import annotations

import ipaddress

from edge_sdk.core.addresses import ip_address


def network_of(address: str) -> str:
    """What one customer of a provider has: an IPv4 address, or the /64 of an IPv6 address."""
    found = ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, 64), strict=False))
    return address if found is None else str(found)
