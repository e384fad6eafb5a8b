"""Keys and certificates for tests: of authorities, of hosts, of impostors, valid at any time."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from edge_sdk.core.invitation import pin_of

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files and as what they are."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    cert_file: Path
    key_file: Path

    @property
    def pin(self) -> str:
        return pin_of(self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    how = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def pair(
    folder: Path,
    name: str,
    *hosts: str,
    key: ec.EllipticCurvePrivateKey | None = None,
    by: Pair | None = None,
    days: float = 30.0,
    authority: bool = False,
) -> Pair:
    """A certificate for hosts, by itself or by an authority, valid for so many days; negative: until then."""
    key, subject = key or new_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    ends = datetime.datetime.now(datetime.UTC) + days * DAY
    issuer = by.certificate.subject if by else subject
    public = key.public_key()
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), ends - 400 * DAY, ends)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key() if by else public), False
        )
    )
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general(host) for host in hosts]), False
        )
    made = builder.sign(by.key if by else key, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True)
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}-key.pem"
    cert_file.write_bytes(made.public_bytes(Encoding.PEM))
    key_file.write_bytes(pem(key))
    return Pair(made, key, cert_file, key_file)


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
