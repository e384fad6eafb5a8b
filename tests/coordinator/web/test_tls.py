"""The coordinator's key stays for the life of its folder; its certificate is made again when it must be."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator.storage.failpoints import VARIABLE, Point
from coordinator.upkeep.data_folder import CERTIFICATE_FILE, KEY_FILE
from coordinator.web import tls
from coordinator.web.tls import Certificate, own_certificate, renewing
from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import pin_of
from tests.certificates import new_key, pair, pem, read, read_key
from tests.coordinator.devices import configuration
from tests.faults.outside import temporaries
from tests.faults.test_kills import MAKING_A_KEY
from tests.processes import CoordinatorProcess, command

NAMES = ("host.example", "192.0.2.7", "::1")


def test_it_is_made_once_and_only_its_host_may_read_the_key(tmp_path: Path) -> None:
    made = own_certificate(tmp_path, NAMES)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {KEY_FILE, CERTIFICATE_FILE}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    assert own_certificate(tmp_path, NAMES) == made
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    said = read(made.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert said.get_values_for_type(x509.DNSName) == ["host.example"]
    assert [str(address) for address in said.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    assert made.context().minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    "wrong", ["gone", "damaged", "of another key", "expired", "expires soon", "other names"]
)
def test_a_certificate_that_will_not_do_is_made_again_with_the_same_key(tmp_path: Path, wrong: str) -> None:
    made = own_certificate(tmp_path, NAMES[:1] if wrong == "other names" else NAMES)
    key = read_key(made.key)
    path, before = made.certificate, made.certificate.read_bytes()
    match wrong:
        case "gone":
            path.unlink()
        case "damaged":
            path.write_bytes(before[:-100])
        case "of another key":
            path.write_bytes(pair(tmp_path / "x", "x", *NAMES).cert_file.read_bytes())
        case "expired" | "expires soon":
            days = -1.0 if wrong == "expired" else 100.0
            path.write_bytes(pair(tmp_path / "x", "x", *NAMES, key=key, days=days).cert_file.read_bytes())
    again = own_certificate(tmp_path, NAMES)
    assert again == made
    assert read(again.certificate).public_key() == key.public_key()
    assert path.read_bytes() != before
    assert own_certificate(tmp_path, NAMES).certificate.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PRIVATE KEY-----\n", b"\xff" * 200, "locked", "a certificate"]
)
def test_a_damaged_key_is_said_in_one_line_and_stays(tmp_path: Path, content: bytes | str) -> None:
    own_certificate(tmp_path, NAMES)
    if content == "locked":
        content = pem(new_key(), b"secret")
    if content == "a certificate":
        content = (tmp_path / CERTIFICATE_FILE).read_bytes()
    assert isinstance(content, bytes)
    (tmp_path / KEY_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"^\S*tls-key\.pem is damaged[^\n]+restore it from a backup[^\n]+$"):
        own_certificate(tmp_path, NAMES)
    assert (tmp_path / KEY_FILE).read_bytes() == content


@pytest.mark.parametrize("point", MAKING_A_KEY)
def test_killed_while_it_is_made(tmp_path: Path, point: Point) -> None:
    coordinator = CoordinatorProcess(tmp_path, configuration(tmp_path), "--tls")
    coordinator.environment[VARIABLE] = f"{point}=kill"
    with pytest.raises(AssertionError, match=f"reached {point}"):
        coordinator.start()
    key = coordinator.data / KEY_FILE
    before = key.read_bytes() if key.exists() else b""
    assert bool(before) == (point != "tls-key-written")
    del coordinator.environment[VARIABLE]
    with coordinator:
        assert key.read_bytes().startswith(before)
        assert temporaries(coordinator.data) == []
        assert coordinator.scheme == "https"
        assert coordinator.stop() == 0


def test_a_backup_carries_the_key(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path), "--tls") as coordinator:
        out = tmp_path / "backup"
        done = command("coordinator.cli", "backup", "--data", coordinator.data, "--out", out)
        assert done.returncode == 0, done.stderr
        for name in (KEY_FILE, CERTIFICATE_FILE):
            assert (out / name).read_bytes() == (coordinator.data / name).read_bytes()
            assert stat.S_IMODE((out / name).stat().st_mode) == 0o600
        pin, coordinator.data = coordinator.pin, out
        assert len(pin) == 43
        coordinator.stop()
        coordinator.start()
        assert coordinator.pin == pin


# --- the host's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("no certificate", "cert.pem: cannot be read (No such file"),
        ("no key", "key.pem: cannot be read (No such file"),
        ("a folder", "cannot be read (Is a directory)"),
        ("not PEM", "not a certificate and its private key in PEM"),
        ("two strangers", "not a certificate and its private key in PEM"),
        ("a certificate alone", "not a certificate and its private key in PEM"),
        ("locked", "the key has a password"),
    ],
)
def test_files_that_will_not_do_are_named_in_one_line(tmp_path: Path, wrong: str, said: str) -> None:
    one, other = pair(tmp_path, "one", "localhost"), pair(tmp_path, "other", "localhost")
    cert, key = one.cert_file, one.key_file
    match wrong:
        case "no certificate":
            cert = tmp_path / "cert.pem"
        case "no key":
            key = tmp_path / "key.pem"
        case "a folder":
            cert = tmp_path
        case "not PEM":
            cert.write_bytes(b"\xff\x00 nothing")
        case "two strangers":
            key = other.key_file
        case "a certificate alone":
            key = cert
        case "locked":
            key.write_bytes(pem(one.key, b"secret"))
    with pytest.raises(InputError, match="^[^\n]+$") as raised:
        Certificate(cert, key).context()
    assert said in str(raised.value)


@pytest.mark.parametrize("arguments", [("--cert",), ("--cert", "--key")])
def test_bad_files_end_a_start_with_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    words = [word for flag in arguments for word in (flag, str(tmp_path / "nothing.pem"))]
    done = command("coordinator.cli", "serve", "--data", tmp_path / "data", "--port", 0, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "nothing.pem: cannot be read" in done.stderr


def shown_by(port: int) -> str:
    """The pin of the key that a server shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), 10.0) as connection,
        context.wrap_socket(connection) as secured,
    ):
        found = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    return pin_of(found.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def test_a_renewed_certificate_is_taken_up_and_half_of_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.05)
    caplog.set_level(logging.INFO)
    old, new = pair(tmp_path, "served", "localhost"), pair(tmp_path / "new", "served", "localhost")
    served = Certificate(old.cert_file, old.key_file)
    context = served.context()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def until(said: str) -> None:
        while said not in caplog.text:  # noqa: ASYNC110 - what a log says sets no event
            await asyncio.sleep(0.02)

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        async with server, renewing(served, context), asyncio.timeout(30.0):
            assert await asyncio.to_thread(shown_by, port) == old.pin
            old.cert_file.write_bytes(new.cert_file.read_bytes())
            await until("the renewed certificate is not taken up")
            assert await asyncio.to_thread(shown_by, port) == old.pin
            old.key_file.write_bytes(new.key_file.read_bytes())
            await until("was renewed")
            assert await asyncio.to_thread(shown_by, port) == new.pin

    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() <= before
