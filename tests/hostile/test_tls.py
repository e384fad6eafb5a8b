"""Whoever answers at the coordinator's address without its key gets nothing, and the address is its host's.

The devices here are whole ones, but for the training itself; the coordinators are real processes.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.upkeep.data_folder import CERTIFICATE_FILE, KEY_FILE
from coordinator.web.tls import own_certificate
from edge_sdk.connection import transport
from edge_sdk.connection.transport import Transport
from edge_sdk.connection.trust import Trust
from edge_sdk.core.errors import InputError, Unreachable, WrongKey
from edge_sdk.core.invitation import Invitation, parse
from edge_sdk.core.messages import Base
from edge_sdk.membership.session import Session
from edge_sdk.model import base_model
from tests.certificates import pair, read, read_key
from tests.coordinator.devices import configuration
from tests.device_agents import Device, device, federation_config, quick, text_of
from tests.hostile.harness import attacked, bearer
from tests.hostile.impostor import Impostor, impostor, speaking_tls
from tests.models import build_model
from tests.processes import PATIENCE_S, CoordinatorProcess, command

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_model.describe(str(build_model(tmp_path_factory.mktemp("base"), "llama")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_of(tmp_path_factory.mktemp("data"))


@pytest.fixture
def coordinator(tmp_path: Path, base: Base) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path, federation_config(tmp_path, base), "--tls") as process:
        yield process


def joined(coordinator: CoordinatorProcess, folder: Path, data: Path) -> Device:
    """A device that has joined by the one string, and handed in an update."""
    made = device(coordinator.invitation, None, folder, data)
    assert made.agent.run(updates=1) == 1
    made.agent.close()
    return made


def session_of(it: Device) -> Session:
    found = it.agent.journal.load()
    assert found is not None
    return found


@contextlib.contextmanager
def running(it: Device) -> Iterator[None]:
    """The device's loop, in a thread of its own."""
    it.agent.start()
    try:
        yield
    finally:
        while not it.agent.stop(timeout_s=PATIENCE_S).done:
            pass
        it.agent.close()


def waited_for(it: Device, words: str, kind: Any = "offline") -> None:
    """Until the device tells that."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(words in text for text in it.texts(kind)):
        assert time.monotonic() < deadline, it.events[-5:]
        time.sleep(0.02)


def got_no_secret(who: Impostor, *secrets: str) -> None:
    assert who.connections > 0
    for secret in secrets:
        assert secret.encode() not in who.requests + who.raw


# --- somebody else at the address -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["another key", "a certificate that says the same", "an authority's", "plain HTTP"]
)
def test_an_impostor_that_answers_401_gets_nothing_and_the_device_goes_on(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = joined(coordinator, tmp_path / "red", data)
    secrets = (session_of(it).credential, coordinator.join_token)
    assert session_of(it).pin == coordinator.pin != ""
    coordinator.stop()

    said = "does not have the key of the coordinator that this device was invited to, and was sent nothing"
    tls: ssl.SSLContext | None = None
    match kind:
        case "another key":
            made = pair(tmp_path, "other", "127.0.0.1")
            tls = speaking_tls(made.cert_file, made.key_file)
        case "a certificate that says the same":
            made = pair(tmp_path, "flexlora-edge coordinator", "localhost", "127.0.0.1")
            tls = speaking_tls(made.cert_file, made.key_file)
        case "an authority's":  # one that the whole machine trusts
            authority = pair(tmp_path, "authority", authority=True)
            made = pair(tmp_path, "host", "127.0.0.1", by=authority)
            tls = speaking_tls(made.cert_file, made.key_file)
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.cert_file))
        case _:
            said = "does not speak TLS, and was sent nothing"
    again = device(coordinator.invitation, None, tmp_path / "red", data)
    with impostor(coordinator.port, tls) as who, running(again):
        waited_for(again, said)
        assert len(again.texts("offline")[0].splitlines()) == 1
        got_no_secret(who, *secrets)
        assert who.requests == b""
        assert b"HTTP" not in who.raw
        who.close()
        coordinator.start()
        waited_for(again, "", "delivered")
    assert again.texts("joined", "notice") == []
    assert session_of(again).credential == secrets[0]


def test_an_impostor_in_the_middle_of_the_work_gets_nothing_either(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """The device is running, with connections of its own, when its coordinator goes and another one comes."""
    it = device(coordinator.invitation, None, tmp_path / "red", data)
    made = pair(tmp_path, "other", "127.0.0.1")
    with running(it):
        waited_for(it, "", "delivered")
        coordinator.kill()
        with impostor(coordinator.port, speaking_tls(made.cert_file, made.key_file)) as who:
            waited_for(it, "does not have the key of the coordinator")
            assert who.requests == b""
        coordinator.start()
        delivered = len(it.texts("delivered"))
        deadline = time.monotonic() + PATIENCE_S
        while len(it.texts("delivered")) == delivered:
            assert time.monotonic() < deadline, it.events[-5:]
            time.sleep(0.02)


def test_a_new_device_tells_an_impostor_nothing(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    invitation = parse(coordinator.invitation)
    coordinator.stop()
    made = pair(tmp_path, "other", "127.0.0.1")
    with impostor(coordinator.port, speaking_tls(made.cert_file, made.key_file)) as who:
        it = device(str(invitation), None, tmp_path / "red", data)
        with pytest.raises(WrongKey, match="was sent nothing"):
            it.agent.run(updates=1)
        got_no_secret(who, invitation.token)
        assert who.requests == b""


def test_without_a_pin_an_authority_must_vouch_for_the_name(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """The address alone, to a device that has not joined; with --ca it is enough."""
    token = coordinator.join_token
    it = device(coordinator.url, token, tmp_path / "red", data)
    with pytest.raises(
        WrongKey, match=r"nobody that this device trusts vouches for .*self-signed.*--ca FILE"
    ):
        it.agent.run(updates=1)
    ca = coordinator.data / CERTIFICATE_FILE
    it = device(coordinator.url, token, tmp_path / "red", data, ca=ca)
    assert it.agent.run(updates=1) == 1
    it.agent.close()
    assert session_of(it).pin == ""

    coordinator.stop()
    made = pair(tmp_path, "other", "another.example", "10.0.0.1")
    trust = Trust(ca=made.cert_file)
    with impostor(coordinator.port, speaking_tls(made.cert_file, made.key_file)) as who:
        connection = Transport(coordinator.url, token, trust=trust)
        with pytest.raises(WrongKey, match="was sent nothing"):
            connection.federation()
        connection.close()
        assert who.requests == b""


def test_a_later_start_by_the_address_alone_knows_the_key(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    joined(coordinator, tmp_path / "red", data)
    again = device(coordinator.url, None, tmp_path / "red", data)
    assert again.agent.run(updates=1) == 1
    again.agent.close()


def test_an_invitation_to_another_key_brings_that_one_no_old_credential(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Its host has lost the key and says so by a new invitation: the device joins anew, by that."""
    it = joined(coordinator, tmp_path / "red", data)
    old = session_of(it)
    coordinator.stop()
    made = pair(tmp_path, "other", "127.0.0.1")
    invitation = Invitation(coordinator.url, "another_token", made.pin)
    with impostor(coordinator.port, speaking_tls(made.cert_file, made.key_file)) as who:
        again = device(str(invitation), None, tmp_path / "red", data)
        with pytest.raises(Exception, match="join again"):
            again.agent.run(updates=1)
        assert b"another_token" in who.requests
        got_no_secret(who, old.credential, coordinator.join_token)

    (coordinator.data / KEY_FILE).unlink()
    coordinator.start()
    assert coordinator.pin != old.pin
    again = device(coordinator.invitation, None, tmp_path / "red", data)
    assert again.agent.run(updates=1) == 1
    again.agent.close()
    assert "names another key" in again.texts("notice")[0]
    assert session_of(again).pin == coordinator.pin


# --- plain HTTP -----------------------------------------------------------------------------------


def test_what_was_joined_with_tls_is_never_spoken_to_in_plain(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    it = joined(coordinator, tmp_path / "red", data)
    coordinator.stop()
    with impostor(coordinator.port, None) as who:
        plain = coordinator.url.replace("https:", "http:")
        for token in (None, coordinator.join_token):
            again = device(plain, token, tmp_path / "red", data, insecure=True)
            with pytest.raises(InputError, match=r"^this device joined https://[^\n]+ with TLS[^\n]+$"):
                again.agent.run(updates=1)
        assert (who.connections, who.raw) == (0, b"")
    assert session_of(it).pin == coordinator.pin


def test_plain_http_beyond_this_machine_is_refused_before_a_byte_is_sent(data: Path, tmp_path: Path) -> None:
    with impostor(0, None, "0.0.0.0") as who:
        url = f"http://0.0.0.0:{who.port}"
        for place in (url, f"flexlora+{url}/#token"):
            it = device(place, None if "#" in place else "token", tmp_path / "red", data)
            with pytest.raises(InputError, match="plain HTTP: everybody on the way would read"):
                it.agent.run(updates=1)
        assert who.connections == 0


def test_over_plain_http_a_401_brings_no_join_token(base: Base, data: Path, tmp_path: Path) -> None:
    """Allowed by both sides, and joined; then somebody else answers at that address, as anybody may."""
    config = federation_config(tmp_path, base)
    with CoordinatorProcess(tmp_path, config, "--host", "0.0.0.0", "--insecure") as coordinator:
        url, token = f"http://0.0.0.0:{coordinator.port}", coordinator.join_token
        it = device(url, token, tmp_path / "red", data, insecure=True)
        assert it.agent.run(updates=1) == 1
        it.agent.close()
        coordinator.stop()
        again = device(url, token, tmp_path / "red", data, insecure=True)
        with impostor(coordinator.port, None, "0.0.0.0") as who, running(again):
            waited_for(again, "over plain HTTP that may be anybody: the join token is not sent")
            got_no_secret(who, token)
            who.close()
            coordinator.start()
            waited_for(again, "", "delivered")


def test_what_is_on_this_machine_is_asked_without_a_proxy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy is another machine, to which plain HTTP would tell everything."""
    with impostor(0, None) as proxy, impostor(0, None) as there:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        connection = Transport(f"http://localhost:{there.port}", "token")
        with pytest.raises(Exception, match="join again"):
            connection.federation()
        connection.close()
        assert (there.connections, proxy.connections) == (1, 0)


def test_a_proxy_on_the_way_sees_neither_key_nor_secret(
    coordinator: CoordinatorProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked to connect, and says 401 as to everything else."""
    monkeypatch.setattr(transport, "is_local", lambda host: False)
    with impostor(0, None) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        connection = Transport(coordinator.url, "token", trust=Trust(coordinator.pin))
        with pytest.raises(Unreachable):
            connection.federation()
        connection.close()
        assert proxy.raw.startswith(b"CONNECT ")
        got_no_secret(proxy, "token")


# --- old TLS, old certificates --------------------------------------------------------------------


def old_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """TLS 1.1 and no later, as far as the library still can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def test_old_versions_of_tls_are_spoken_by_neither_side(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    context = old_tls(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", coordinator.port), PATIENCE_S) as connection,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(connection)
    made = pair(tmp_path, "old", "127.0.0.1")
    with impostor(0, old_tls(speaking_tls(made.cert_file, made.key_file))) as who:
        connection = Transport(f"https://127.0.0.1:{who.port}", "token", trust=Trust(made.pin))
        with pytest.raises(Unreachable):
            connection.federation()
        connection.close()
        assert (who.connections, who.requests) == (1, b"")


def test_an_expired_certificate_of_its_own_keeps_no_device_out(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Ten years have passed. To a device the key alone counts; the next start makes another certificate."""
    it = joined(coordinator, tmp_path / "red", data)
    path = coordinator.data / CERTIFICATE_FILE
    key = read_key(coordinator.data / KEY_FILE)
    expired = pair(tmp_path, "expired", "127.0.0.1", key=key, days=-1.0)
    with impostor(0, speaking_tls(expired.cert_file, expired.key_file)) as who:
        connection = Transport(f"https://127.0.0.1:{who.port}", "token", trust=Trust(coordinator.pin))
        with pytest.raises(Exception, match="join again"):
            connection.federation()
        connection.close()
        assert b"token" in who.requests

    coordinator.stop()
    path.write_bytes(expired.cert_file.read_bytes())
    coordinator.start()
    assert coordinator.pin == session_of(it).pin
    assert read(path).not_valid_after_utc.timestamp() > time.time() + 9 * 365 * 86400
    assert own_certificate(coordinator.data, []).pin == coordinator.pin
    again = device(coordinator.url, None, tmp_path / "red", data)
    assert again.agent.run(updates=1) == 1
    again.agent.close()


# --- handshakes that hang -------------------------------------------------------------------------


def test_handshakes_that_hang_keep_nobody_waiting_and_end(tmp_path: Path) -> None:
    """Of 300 connections a third says nothing, a third half a greeting, and a third speaks plain HTTP."""
    with attacked(tmp_path, None, "carry", ("--tls",)) as target:
        openings = [
            b"",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ]
        hanging = []
        for number in range(300):
            connection = socket.create_connection(("127.0.0.1", target.coordinator.port), PATIENCE_S)
            connection.sendall(openings[number % 3])
            hanging.append(connection)
        assert target.serve(3) < 10.0
        deadline = time.monotonic() + PATIENCE_S
        for connection in hanging:
            with contextlib.suppress(ConnectionError):
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                while connection.recv(65536):
                    pass
            connection.close()
        assert time.monotonic() < deadline


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap is what was measured")
def test_idle_connections_with_tls_take_little_memory(tmp_path: Path) -> None:
    """asyncio's own buffers would make 280 KiB of each."""
    with attacked(tmp_path, None, "carry", ("--tls",)) as target, contextlib.ExitStack() as opened:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        before = target.process.memory_info().rss
        for _ in range(300):
            connection = socket.create_connection(("127.0.0.1", target.coordinator.port), PATIENCE_S)
            opened.enter_context(context.wrap_socket(connection))
        assert target.process.memory_info().rss - before < 300 * 100 * 1024


def test_a_handshake_that_drips_is_given_up_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "TIMEOUT", httpx.Timeout(60.0, connect=1.0))
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"\x16\x03\x03\x40\x00\x02" + bytes(1000):
                    connection.sendall(bytes([byte]))
                    if stop.wait(0.2):
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        begun = time.monotonic()
        connection = Transport(
            f"https://127.0.0.1:{listening.getsockname()[1]}", "token", trust=Trust("A" * 43)
        )
        with pytest.raises(Unreachable):
            connection.federation()
        assert time.monotonic() - begun < 30.0
        connection.close()
        stop.set()
        thread.join(PATIENCE_S)


# --- secrets elsewhere ----------------------------------------------------------------------------


def test_the_key_is_its_hosts_alone(coordinator: CoordinatorProcess) -> None:
    for name in (KEY_FILE, CERTIFICATE_FILE):
        assert stat.S_IMODE((coordinator.data / name).stat().st_mode) == 0o600
    assert "PRIVATE KEY" not in coordinator.log.read_text()


# --- names that are turned to this machine, and words of proxies ----------------------------------


def test_a_page_in_a_browser_is_not_answered_under_its_own_name(tmp_path: Path) -> None:
    """DNS rebinding: the page's name leads here, and the browser says that name."""
    with attacked(tmp_path) as target:
        url, port = target.coordinator.url, target.coordinator.port
        secret = bearer(target.coordinator.join_token)
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[::2]:80",
            "",
        ):
            answer = httpx.get(url + "/v1/federation", headers=secret | {"Host": host}, trust_env=False)
            assert (answer.status_code, answer.json()["title"]) == (421, "wrong host"), host
            assert answer.headers["Content-Type"].startswith("application/problem+json")
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST:1"):
            answer = httpx.get(url + "/v1/federation", headers=secret | {"Host": host}, trust_env=False)
            assert answer.status_code == 200, host


def test_only_a_trusted_proxy_says_who_asks(tmp_path: Path) -> None:
    def asked_by(coordinator: CoordinatorProcess, said: str) -> str:
        """The address in the log of a request that is refused."""
        before = len(coordinator.log.read_text())
        httpx.get(f"{coordinator.url}/v1/federation", headers={"X-Forwarded-For": said}, trust_env=False)
        return coordinator.log.read_text()[before:]

    config = configuration(tmp_path)
    with CoordinatorProcess(tmp_path, config) as coordinator:
        assert "from 127.0.0.1: " in asked_by(coordinator, "6.6.6.6")
        coordinator.stop()
        coordinator.config.write_text(config + "[serving]\ntrusted_proxies = ['127.0.0.1', '10.0.0.0/8']\n")
        coordinator.start()
        assert "from 203.0.113.9: " in asked_by(coordinator, "6.6.6.6, 203.0.113.9, 10.1.2.3")


def test_what_passes_by_the_proxy_is_refused(tmp_path: Path) -> None:
    """Plain HTTP beyond this machine is for the proxies that the host named."""
    config = configuration(tmp_path) + "[serving]\ntrusted_proxies = ['10.0.0.0/8']\n"
    with CoordinatorProcess(tmp_path, config, "--host", "0.0.0.0") as coordinator:
        assert coordinator.scheme == "http"
        url = f"http://127.0.0.1:{coordinator.port}"
        assert httpx.get(f"{url}/v1/openapi.json", trust_env=False).status_code == 200
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
        if address.startswith(("127.", "10.")):
            pytest.skip("this machine has no address of its own besides those of the proxies")
        answer = httpx.get(f"http://{address}:{coordinator.port}/v1/openapi.json", trust_env=False)
        assert (answer.status_code, answer.json()["title"]) == (421, "wrong host")


def test_an_invitation_need_not_stand_on_the_command_line(
    coordinator: CoordinatorProcess, data: Path, tmp_path: Path
) -> None:
    """Every user of a machine may read its list of processes."""
    file = tmp_path / "invitation"
    file.write_text(coordinator.invitation + "\n")
    arguments = ("--data", data, "--state", tmp_path / "state", "--dry-run")
    for place, environ in ((f"@{file}", {}), (None, {"EDGE_INVITATION": coordinator.invitation})):
        done = command("edge_sdk.cli", "join", *([place] if place else []), *arguments, environ=environ)
        assert done.returncode == 0, done.stderr
        assert "Nothing was joined" in done.stdout
        assert coordinator.join_token not in done.stdout + done.stderr
