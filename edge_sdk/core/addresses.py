"""Addresses of coordinators, as people and invitations write them."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse

from edge_sdk.core.errors import InputError

DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def is_local(host: str) -> bool:
    """Whether a host, IPv6 without brackets, is this machine itself: nobody else can listen on the way."""
    address = ip_address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `text` is, without its zone, IPv4 as such where it is mapped; None for a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def in_url(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def normal_address(url: str) -> str:
    """An address of a coordinator in its one form: lower case, without the usual port and a slash at its end.

    Raises:
        InputError: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port, host = parts.port, parts.netloc.rpartition(":")[0] if parts.port is not None else parts.netloc
    except ValueError as error:
        raise _no_address(url) from error
    path = parts.path.rstrip("/")
    good = parts.scheme in DEFAULT_PORTS and _HOST.fullmatch(host) and _PATH.fullmatch(path) and port != 0
    if not good or parts.query or parts.fragment or not url.isascii() or url != "".join(url.split()):
        raise _no_address(url)
    ending = "" if port in (None, DEFAULT_PORTS[parts.scheme]) else f":{port}"
    return f"{parts.scheme}://{host.lower()}{ending}{path}"


def _no_address(url: str) -> InputError:
    shown = url.partition("#")[0]
    return InputError(
        f"{shown[:200]!r} is no address of a coordinator; write it like https://192.168.1.20:8765"
    )
