"""Who the coordinator must be, to a device that has joined: what it remembers counts, or its owner's word.

Whoever answers at the coordinator's address may be somebody else: after its host has let a name or an address
go, or while it is down. Neither the device's credential nor a join token is for them.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from edge_sdk.connection.trust import Trust
from edge_sdk.core.addresses import is_local
from edge_sdk.core.errors import InputError, WrongKey
from edge_sdk.membership.session import Session
from edge_sdk.options import Options


def trust_in(url: str, pin: str, options: Options, known: Session | None) -> Trust:
    """Whom to trust at an address.

    Args:
        url: the address.
        pin: of the key that the owner's invitation names, or "".
        options: the device's.
        known: what it remembers, if it has joined.

    Raises:
        InputError: it joined with TLS, and the address is one without.
    """
    if known and _has_tls(known.url) and not _has_tls(url):
        raise InputError(
            f"this device joined {known.url} with TLS; at {url}, which is plain HTTP, anybody could answer. "
            "Give the https:// address, or another state folder"
        )
    return Trust(pin or (known.pin if known else ""), options.ca, options.insecure)


def names_another_key(pin: str, known: Session) -> bool:
    """Whether the invitation is of another coordinator than the one that gave this device its credential."""
    return bool(pin and known.pin) and pin != known.pin


def require_known(url: str) -> None:
    """Raise WrongKey where a coordinator that has forgotten a device cannot be told from anybody else.

    Whoever says so is sent the join token next.
    """
    if not _has_tls(url) and not is_local(urlsplit(url).hostname or ""):
        raise WrongKey(
            f"whoever answers at {url} does not know this device, and over plain HTTP that may be anybody: "
            "the join token is not sent. Ask the host; if it has forgotten this device, join with another "
            "state folder"
        )


def _has_tls(url: str) -> bool:
    return urlsplit(url).scheme == "https"
