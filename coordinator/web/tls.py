"""The coordinator's key and certificate: its own, made at the first start that needs them, or its host's.

Devices go by the key, whose pin stands in their invitations. So the key stays for the life of the folder, and
a backup carries it; the certificate says nothing that counts, and is made again whenever it must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.storage.disk import blaming
from coordinator.storage.failpoints import reach
from coordinator.upkeep.data_folder import CERTIFICATE_FILE, KEY_FILE
from edge_sdk.core.addresses import ip_address
from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import pin_of
from edge_sdk.system.durable import Step, replacing
from edge_sdk.system.terminal import logger

log = logger("coordinator")
VALID = datetime.timedelta(days=3650)
LEAST_LEFT = datetime.timedelta(days=365)  # a certificate of ours that is valid for less is made anew
EARLIER = datetime.timedelta(days=1)  # than now it begins: clocks differ
LOOK_S = 60.0  # how often files are looked at, in case somebody renews them
COMMON_NAME = "flexlora-edge coordinator"


@dataclass(frozen=True)
class Certificate:
    """Files in PEM that a server speaks TLS with.

    Attributes:
        pin: of the key, where devices are to go by it; "" for a certificate that others vouch for.
    """

    certificate: Path
    key: Path
    pin: str = ""

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 and later with this certificate.

        Raises:
            InputError: the files cannot be used, or do not belong together; names them.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        return context

    def stamps(self) -> tuple[int, ...]:
        """When the files were changed last; 0 for one that is not there at this moment."""
        found = []
        for path in (self.certificate, self.key):
            try:
                found.append(path.stat().st_mtime_ns)
            except OSError:
                found.append(0)
        return tuple(found)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Have a context use these files, as they are now, for the connections that follow.

        Raises:
            InputError: as `context`.
        """
        for path in (self.certificate, self.key):
            try:
                path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except _Locked as error:
            raise InputError(
                f"{self.key}: the key has a password, and nobody is there at a start to give it; "
                "`openssl pkey` takes it away"
            ) from error
        except (ssl.SSLError, OSError, ValueError) as error:
            named = str(self.certificate) + ("" if self.key == self.certificate else f" and {self.key}")
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"{named}: not a certificate and its private key in PEM ({reason}); give the certificate "
                "with its chain in --cert, and the key in --key"
            ) from error


@contextlib.asynccontextmanager
async def renewing(certificate: Certificate | None, context: ssl.SSLContext | None) -> AsyncIterator[None]:
    """While inside, files that somebody renews, as ACME clients do, are taken up within LOOK_S."""
    if certificate is None or context is None:
        yield
        return
    task = asyncio.create_task(_follow(certificate, context))
    try:
        yield
    finally:
        task.cancel()


async def _follow(certificate: Certificate, context: ssl.SSLContext) -> None:
    seen = certificate.stamps()
    while True:
        await asyncio.sleep(LOOK_S)
        if (now := certificate.stamps()) == seen:
            continue
        seen = now
        try:
            certificate.context()  # tried apart from the one in use: half of a renewal does not fit
            certificate.load_into(context)
        except InputError as error:
            log.warning("the renewed certificate is not taken up: %s", error)
        else:
            log.info("the certificate in %s was renewed", certificate.certificate)


class _Locked(Exception):
    """A key with a password."""


def _no_password() -> str:
    raise _Locked


# --- our own ----------------------------------------------------------------------------------------


def own_certificate(folder: Path, names: Sequence[str]) -> Certificate:
    """The key and certificate of a data folder, made durably where they are missing.

    Args:
        folder: the data folder.
        names: hosts that the certificate should name, for those who go by it and not by the key.

    Raises:
        InputError: the key is damaged.
        DiskFull, InternalError: the disk does not take them.
    """
    key_path, path = folder / KEY_FILE, folder / CERTIFICATE_FILE
    if not key_path.exists():
        made = ec.generate_private_key(ec.SECP256R1())
        text = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with blaming(KEY_FILE), replacing(key_path, at=_writing_key) as file:
            file.write(text)
    key = _read_key(key_path)
    if not _is_good(path, key, names):
        with blaming(CERTIFICATE_FILE), replacing(path, at=_writing_certificate) as file:
            file.write(_certificate(key, names).public_bytes(Encoding.PEM))
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Certificate(path, key_path, pin_of(public))


def _writing_key(step: Step) -> None:
    reach("tls-key-written" if step == "written" else "tls-key-renamed")


def _writing_certificate(step: Step) -> None:
    reach("tls-certificate-written" if step == "written" else "tls-certificate-renamed")


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _damaged(path)
    return key


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged, and devices know this coordinator by it; restore it from a backup. Without one, "
        "remove it: the next start makes another, and every device needs a new invitation"
    )


def _is_good(path: Path, key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> bool:
    """Whether the certificate there is of this key, names these hosts, and is valid for some time to come."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        said = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        return (
            found.public_key() == key.public_key() and left > LEAST_LEFT and set(_names(names)) <= set(said)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False


def _certificate(key: ec.EllipticCurvePrivateKey, names: Sequence[str]) -> x509.Certificate:
    """A certificate that the key vouches for itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, COMMON_NAME)])
    now, public = datetime.datetime.now(datetime.UTC), key.public_key()
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign"),
        False,
    )
    return (
        x509.CertificateBuilder(name, name, public, x509.random_serial_number(), now - EARLIER, now + VALID)
        .add_extension(x509.SubjectAlternativeName(_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True, crl_sign=False, encipher_only=False, decipher_only=False, **usage
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Hosts as a certificate names them, each once."""
    found: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        address = ip_address(host)
        found.append(x509.DNSName(host) if address is None else x509.IPAddress(address))
    return found
