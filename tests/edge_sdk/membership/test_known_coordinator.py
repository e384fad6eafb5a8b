"""Whom a device that has joined trusts, by what it remembers and by what its owner says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk.agent import Agent
from edge_sdk.connection.trust import Trust
from edge_sdk.core.errors import InputError, WrongKey
from edge_sdk.core.invitation import pin_of
from edge_sdk.core.messages import JoinReply
from edge_sdk.core.records import encode
from edge_sdk.membership.journal import SESSION, Journal
from edge_sdk.membership.known_coordinator import names_another_key, require_known, trust_in
from edge_sdk.membership.session import joined
from edge_sdk.options import Options
from tests.edge_sdk.core.wire_samples import FEDERATION

PIN, OTHER = pin_of(b"key"), pin_of(b"another")
PINNED = joined("https://h", JoinReply("d", "secret", FEDERATION), pin=PIN)
PLAIN = joined("http://h", JoinReply("d", "secret", FEDERATION))
OPTIONS = Options(ca=Path("ca.pem"), insecure=True)


def test_what_it_joined_by_counts_until_its_owner_says_more() -> None:
    assert trust_in("https://h", "", OPTIONS, None) == Trust("", Path("ca.pem"), True)
    assert trust_in("https://h", PIN, Options(), None) == Trust(PIN)
    assert trust_in("https://h", "", Options(), PINNED) == Trust(PIN)
    assert trust_in("https://moved", "", Options(), PINNED) == Trust(PIN)
    assert trust_in("https://h", OTHER, Options(), PINNED) == Trust(OTHER)
    assert trust_in("https://h", PIN, Options(), PLAIN) == Trust(PIN)


@pytest.mark.parametrize("pin", ["", PIN])
def test_there_is_no_way_back_from_tls(pin: str) -> None:
    with pytest.raises(
        InputError, match=r"^this device joined https://h with TLS; at http://h, which is plain"
    ):
        trust_in("http://h", pin, OPTIONS, PINNED)
    with pytest.raises(InputError, match="joined https://h with TLS"):
        trust_in("http://127.0.0.1:1", pin, OPTIONS, replace(PINNED, pin=""))


def test_which_invitations_are_of_another_coordinator() -> None:
    assert names_another_key(OTHER, PINNED)
    assert not names_another_key(PIN, PINNED)
    assert not names_another_key("", PINNED)
    assert not names_another_key(PIN, PLAIN)


def test_who_may_say_that_it_has_forgotten_a_device() -> None:
    for url in ("https://h", "http://127.0.0.1:8765", "http://localhost", "http://[::1]:1"):
        require_known(url)
    with pytest.raises(WrongKey, match="over plain HTTP that may be anybody"):
        require_known("http://h")


def test_a_session_of_before_there_were_pins_is_read(tmp_path: Path) -> None:
    document = json.loads(encode(PINNED))
    assert document.pop("pin") == PIN
    (tmp_path / SESSION).write_text(json.dumps(document))
    assert Journal(tmp_path).load() == replace(PINNED, pin="")


@pytest.mark.parametrize("pin", ["x", PIN + "A", PIN[:-1] + "\n", "../../etc"])
def test_a_session_with_a_pin_that_is_none_is_refused(tmp_path: Path, pin: str) -> None:
    (tmp_path / SESSION).write_text(json.dumps(json.loads(encode(PINNED)) | {"pin": pin}))
    with pytest.raises(InputError, match=r"session\.json: not a session"):
        Journal(tmp_path).load()


def test_an_application_gives_an_invitation_alone(tmp_path: Path) -> None:
    text = f"flexlora+https://h:8765/#token.{PIN}"
    agent = Agent(text, options=Options(state_dir=tmp_path))
    assert agent.url == "https://h:8765"
    with pytest.raises(InputError, match="an invitation brings its own token"):
        Agent(text, join_token="t", options=Options(state_dir=tmp_path))
    with pytest.raises(InputError, match="ends before its token"):
        Agent("flexlora+https://h", options=Options(state_dir=tmp_path))


@pytest.mark.parametrize(
    ("trust", "url", "said"),
    [
        (Trust(), "http://h", "is plain HTTP: everybody on the way would read"),
        (Trust(PIN), "http://127.0.0.1", "is plain HTTP, which has no key to be pinned"),
    ],
)
def test_addresses_to_which_nothing_is_sent(trust: Trust, url: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        trust.require(url)
    assert said in str(raised.value)
    Trust(insecure=True).require("http://h")
    Trust().require("https://h")


@pytest.mark.parametrize(
    "content", [None, b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"]
)
def test_a_file_of_authorities_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^--ca \S+ca\.pem: not a PEM file of certificates \([^\n]+\)$"):
        Trust(ca=path).context("https://h")


def test_a_variable_that_names_no_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone.pem"))
    with pytest.raises(InputError, match=r"^SSL_CERT_FILE names \S+gone\.pem', which is no file"):
        Trust().context("https://h")
    for trust, url in ((Trust(PIN), "https://h"), (Trust(), "http://127.0.0.1")):
        trust.context(url)  # nobody asks an authority there
