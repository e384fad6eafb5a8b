"""One string with all that a device needs to join: where to, what lets it in, and whom it may tell that.

    flexlora+https://host:8765/#TOKEN.PIN

TOKEN is a join token. PIN says which key the coordinator has: the SHA-256 of its SubjectPublicKeyInfo in
base64url, as RFC 7469 pins keys; without one, an authority that the device trusts must vouch for the name.
What follows the # is never part of a request, whoever opens the address in a browser.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import urllib.parse
from dataclasses import dataclass, field

from edge_sdk.core.addresses import normal_address
from edge_sdk.core.errors import InputError

MARK = "flexlora+"  # before the scheme of the address
FORM = f"{MARK}https://host:8765/#TOKEN.PIN"
MOST = 4096  # characters of an invitation, or of a file that holds one
_TOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,255}")
_PIN_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Invitation:
    """An address, a join token, and the pin of the key that the coordinator there has.

    Args:
        url: https://host:port/prefix or http://…, without a slash at its end.
        token: letters, digits, `_` and `-`, of which `-` is not the first.
        pin: as `pin_of` makes it; "" where an authority vouches for the coordinator, or nothing does.

    Raises:
        InputError: one of them cannot be in an invitation; says which, and shows no token.
    """

    url: str
    token: str = field(repr=False)
    pin: str = ""

    def __post_init__(self) -> None:
        if (address := normal_address(self.url)) != self.url:
            raise InputError(f"{self.url!r} in an invitation is written {address!r}")
        if not _TOKEN.fullmatch(self.token):
            raise InputError(
                "the invitation's token is not one: it has letters, digits, _ and -; copy all of it"
            )
        if self.pin:
            require_pin(self.pin)
            if not self.url.startswith("https:"):
                raise InputError(
                    f"an invitation with a pin begins with {MARK}https:, for plain HTTP has no key"
                )

    def __str__(self) -> str:
        """The string; it holds the token."""
        slash = "" if urllib.parse.urlsplit(self.url).path else "/"
        return f"{MARK}{self.url}{slash}#{self.token}" + (f".{self.pin}" if self.pin else "")


def is_invitation(text: str) -> bool:
    """Whether `text` is meant as one, well-formed or not."""
    return _bare(text)[: len(MARK)].lower() == MARK


def parse(text: str) -> Invitation:
    """The invitation that `text` is; blanks and quotes around it do no harm.

    Raises:
        InputError: it is none; says what is wrong with it, and shows no token.
    """
    bare = _bare(text)
    if not is_invitation(bare):
        raise InputError(f"that is no invitation; it begins with {MARK} and looks like {FORM}")
    if len(bare) > MOST:
        raise InputError(f"that is no invitation: it has {len(bare)} characters, and none has over {MOST}")
    address, sharp, secret = bare[len(MARK) :].partition("#")
    if not sharp or not secret:
        raise InputError(
            "the invitation ends before its token; copy all of it, in quotes, with what follows the #"
        )
    token, dot, pin = secret.partition(".")
    if dot and not pin:
        raise InputError("the invitation ends before its pin; copy all of it")
    return Invitation(normal_address(address), token, pin)


def _bare(text: str) -> str:
    """Without what a mail, a shell script or an editor puts around it."""
    return text.strip().strip("'\"<>`").strip()


def pin_of(public_key: bytes) -> str:
    """The pin of a key, given as its SubjectPublicKeyInfo in DER."""
    return base64.urlsafe_b64encode(hashlib.sha256(public_key).digest()).decode().rstrip("=")


def require_pin(pin: str) -> None:
    """Raise InputError for what cannot be a pin: half of one would never fit a key."""
    try:
        whole = base64.urlsafe_b64decode(pin + "=")
        good = len(whole) == _PIN_BYTES and base64.urlsafe_b64encode(whole).decode().rstrip("=") == pin
    except (ValueError, binascii.Error):
        good = False
    if not good:
        raise InputError(
            "the pin is not whole: it has 43 letters, digits, _ and -; copy all of the invitation"
        )
