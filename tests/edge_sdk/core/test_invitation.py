"""The one string to join by: written and read back, and whatever is wrong with it said in one line."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.addresses import is_local, normal_address
from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import Invitation, is_invitation, parse, pin_of

PIN = pin_of(b"a key")
TOKEN = "5ecret_t0ken-"
WHOLE = f"flexlora+https://host.example:8765/#{TOKEN}.{PIN}"

letters = st.sampled_from("abcXYZ019_-")
tokens = st.text(letters, min_size=1, max_size=40).filter(lambda text: text[0] != "-")
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,6})?", fullmatch=True)
hosts = st.one_of(
    names, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(lambda address: f"[{address}]")
)
paths = st.lists(st.from_regex(r"[a-z0-9._~-]{1,8}", fullmatch=True), max_size=3).map(
    lambda parts: "".join(f"/{part}" for part in parts)
)
ports = st.one_of(st.none(), st.integers(1, 65535))
pins = st.binary(max_size=8).map(pin_of)


@st.composite
def invitations(draw: st.DrawFn) -> Invitation:
    scheme, port = draw(st.sampled_from(["http", "https"])), draw(ports)
    address = f"{scheme}://{draw(hosts)}{'' if port is None else f':{port}'}{draw(paths)}"
    pin = draw(st.one_of(st.just(""), pins)) if scheme == "https" else ""
    return Invitation(normal_address(address), draw(tokens), pin)


def test_what_it_looks_like() -> None:
    assert str(Invitation("https://host.example:8765", TOKEN, PIN)) == WHOLE
    assert str(Invitation("https://h/prefix", "t")) == "flexlora+https://h/prefix#t"
    assert len(PIN) == 43
    assert pin_of(b"") == "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"  # SHA-256 of nothing
    assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")


@given(invitations())
def test_what_is_written_is_read_back(invitation: Invitation) -> None:
    assert parse(str(invitation)) == invitation
    assert is_invitation(str(invitation))


@given(invitations())
def test_its_representation_shows_no_token(invitation: Invitation) -> None:
    assert "token" not in repr(invitation)


@pytest.mark.parametrize(
    "around",
    ["{}\n", "  {}  ", "'{}'", '"{}"\r\n', "<{}>", "`{}`"],
    ids=["line", "blanks", "'", '"', "<", "`"],
)
def test_what_stands_around_it_does_no_harm(around: str) -> None:
    assert parse(around.format(WHOLE)) == Invitation("https://host.example:8765", TOKEN, PIN)


@pytest.mark.parametrize(
    "text",
    [
        f"FLEXLORA+HTTPS://HOST.Example:8765/#{TOKEN}.{PIN}",
        f"flexlora+https://host.example:8765#{TOKEN}.{PIN}",
        f"flexlora+https://host.example:8765//#{TOKEN}.{PIN}",
    ],
)
def test_one_place_has_one_form(text: str) -> None:
    assert str(parse(text)) == WHOLE


def test_the_usual_port_is_left_out() -> None:
    assert normal_address("https://h:443/a/") == "https://h/a"
    assert normal_address("http://h:80") == "http://h"
    assert normal_address("https://h:80") == "https://h:80"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with flexlora+"),
        ("https://host:8765", "begins with flexlora+"),
        ("flexlora+https://host:8765", "ends before its token"),
        ("flexlora+https://host:8765/#", "ends before its token"),
        (f"flexlora+https://host/#{TOKEN}.", "ends before its pin"),
        (WHOLE[:-1], "is not whole: it has 43 letters"),
        (WHOLE + "A", "is not whole: it has 43 letters"),
        (WHOLE[:-1] + "B", "is not whole"),  # the last of 43 characters has two bits to spare
        (f"{WHOLE}.{PIN}", "is not whole"),
        (f"flexlora+http://host/#{TOKEN}.{PIN}", "plain HTTP has no key"),
        ("flexlora+https://host/#to ken", "the invitation's token is not one"),
        ("flexlora+https://host/#-x", "the invitation's token is not one"),
        ("flexlora+https://host/#tökén", "the invitation's token is not one"),
        (f"flexlora+ftp://host/#{TOKEN}", "'ftp://host/' is no address"),
        (f"flexlora+https://#{TOKEN}", "is no address"),
        (f"flexlora+https://me:pass@host/#{TOKEN}", "is no address"),
        (f"flexlora+https://host:99999/#{TOKEN}", "is no address"),
        (f"flexlora+https://host:0/#{TOKEN}", "is no address"),
        (f"flexlora+https://host:/#{TOKEN}", "is no address"),
        (f"flexlora+https://[::1/#{TOKEN}", "is no address"),
        (f"flexlora+https://host/?a=b#{TOKEN}", "is no address"),
        (f"flexlora+https://ho\nst/#{TOKEN}", "is no address"),
        (f"flexlora+https://höst/#{TOKEN}", "is no address"),
        (f"flexlora+https://host/../x y#{TOKEN}", "is no address"),
        (f"flexlora+https://host/#{'x' * 5000}", "none has over 4096"),
    ],
)
def test_what_is_wrong_with_it_is_said_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError, match="^[^\n]+$") as raised:
        parse(text)
    assert said in str(raised.value)
    assert TOKEN not in str(raised.value)


@given(st.text() | st.text().map(lambda text: f"flexlora+https://{text}"))
def test_any_text_is_an_invitation_or_an_error_in_one_line(text: str) -> None:
    try:
        found = parse(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert parse(str(found)) == found


@given(invitations(), st.data())
def test_a_piece_of_one_is_refused_or_pins_nothing_else(invitation: Invitation, data: st.DataObject) -> None:
    whole = str(invitation)
    piece = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        found = parse(piece)
    except InputError:
        return
    assert found.url == invitation.url
    assert invitation.token.startswith(found.token)
    assert found.pin == ""


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"]
)
def test_this_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    ["", "localhost.", "localhost.evil.example", "127.0.0.1.example", "0.0.0.0", "::", "10.0.0.1", "127.1"],
)
def test_another_machine_or_one_that_could_be(host: str) -> None:
    assert not is_local(host)
