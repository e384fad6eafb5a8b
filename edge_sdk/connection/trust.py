"""Whom a device takes for its coordinator, decided before a byte of a request is sent to anybody.

A key that is pinned, or else a certificate that an authority vouches for. With a pin only the key counts: a
certificate that is too old, or of another name, changes nothing about who holds the key. It is looked at when
the handshake is over, in which nothing but the name of the host is told; the request follows afterwards.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import certifi

from edge_sdk.core.addresses import is_local
from edge_sdk.core.errors import InputError, Unreachable, WrongKey
from edge_sdk.core.invitation import pin_of

AUTHORITIES = "SSL_CERT_FILE"  # OpenSSL's variable
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE")


@dataclass(frozen=True)
class Trust:
    """Whom to trust at an address.

    Args:
        pin: of the coordinator's key; then nothing else counts.
        ca: PEM file of the authorities that may vouch for it, if not those of the system.
        insecure: whether plain HTTP may leave this machine.
    """

    pin: str = ""
    ca: Path | None = None
    insecure: bool = False

    def require(self, url: str) -> None:
        """Raise InputError for an address to which nothing may be sent as it is written."""
        if urlsplit(url).scheme == "https":
            return
        if self.pin:
            raise InputError(
                f"{url} is plain HTTP, which has no key to be pinned; its address begins with https://"
            )
        if not self.insecure and not is_local(urlsplit(url).hostname or ""):
            raise InputError(
                f"{url} is plain HTTP: everybody on the way would read what lets this device in. Give the "
                "invitation (flexlora+https://…) or an https:// address, or allow it by --insecure "
                "(Options.insecure)"
            )

    def context(self, url: str) -> ssl.SSLContext:
        """What connections to an address are made with, if it is one with TLS.

        Raises:
            InputError: the file of the authorities cannot be used.
        """
        if self.pin:
            context: ssl.SSLContext = _Pinned(self.pin)
        elif urlsplit(url).scheme == "https":
            context = self._vouched_for()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no authority: nothing would do
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def _vouched_for(self) -> ssl.SSLContext:
        named = os.environ.get(AUTHORITIES)
        if self.ca is None and named and not Path(named).is_file():
            raise InputError(f"{AUTHORITIES} names {named!r}, which is no file; mend or unset that variable")
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--ca {self.ca}: not a PEM file of certificates ({reason})") from error
        if self.ca is None and not named:
            context.load_verify_locations(certifi.where())  # a system may have none of its own
        return context


# --- pins -----------------------------------------------------------------------------------------


class _OtherKey(ssl.SSLCertVerificationError):
    """The handshake succeeded, with somebody else."""


class _Pinned(ssl.SSLContext):
    """Connections that are made with it are closed unless the other side has proved to hold this key.

    OpenSSL checks the proof, a signature over the handshake, whatever it is told of certificates.
    """

    pin: str

    def __new__(cls, pin: str) -> _Pinned:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made.pin = pin
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.sslsocket_class, made.sslobject_class = _PinnedSocket, _PinnedObject
        return made


class _PinnedSocket(ssl.SSLSocket):
    """A connection to the coordinator."""

    def do_handshake(self, block: bool = False) -> None:
        """As ever, and then the key."""
        super().do_handshake(block)
        _require_key(self.context, self.getpeercert(binary_form=True))


class _PinnedObject(ssl.SSLObject):
    """A connection to the coordinator within one to a proxy that speaks TLS itself."""

    def do_handshake(self) -> None:
        """As ever, and then the key."""
        super().do_handshake()
        _require_key(self.context, self.getpeercert(binary_form=True))


def _require_key(context: ssl.SSLContext, certificate: bytes | None) -> None:
    assert isinstance(context, _Pinned)
    if certificate is None or _pin(certificate) != context.pin:
        raise _OtherKey("another key than the one that is pinned")


def _pin(certificate: bytes) -> str:
    """The pin of the key in a certificate (DER); "" for what no key can be read from."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from cryptography.x509 import load_der_x509_certificate

    try:
        key = load_der_x509_certificate(certificate).public_key()
        return pin_of(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return ""


# --- what is said of a connection that was not made -----------------------------------------------


def explained(url: str, error: BaseException) -> Unreachable | None:
    """Why no connection was made, where it has to do with who answers; None for every other reason."""
    for cause in _causes(error):
        if isinstance(cause, _OtherKey):
            return WrongKey(
                f"whoever answers at {url} does not have the key of the coordinator that this device was "
                "invited to, and was sent nothing. Ask its host: a lost key takes a new invitation"
            )
        if isinstance(cause, ssl.SSLCertVerificationError):
            return WrongKey(
                f"nobody that this device trusts vouches for whoever answers at {url} "
                f"({cause.verify_message}), who was sent nothing. Give the invitation, which names the "
                "coordinator's key, or --ca FILE"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in _NOT_TLS:
            return WrongKey(
                f"whoever answers at {url} does not speak TLS, and was sent nothing; ask its host"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
