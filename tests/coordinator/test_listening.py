"""Whose word counts about who asks, and which names are the coordinator's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.listening import Serving
from edge_sdk.core.addresses import ip_address
from edge_sdk.core.errors import InputError

PROXIES = Serving(trusted_proxies=("127.0.0.1", "10.0.0.0/8", "2001:db8::/32"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.1", "", "203.0.113.1"),
        ("203.0.113.1", "6.6.6.6", "203.0.113.1"),  # no proxy
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "6.6.6.6,203.0.113.9 , 10.1.1.1", "203.0.113.9"),
        ("::ffff:127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("2001:db8::1", "2a00::7", "2a00::7"),
        ("127.0.0.1", "[2a00::7]:5123", "2a00::7"),
        ("127.0.0.1", "203.0.113.9:5123", "203.0.113.9"),
        ("127.0.0.1", "203.0.113.9, unknown", "127.0.0.1"),  # what is before nonsense is nobody's word
        ("127.0.0.1", "10.0.0.2, 10.0.0.3", "10.0.0.2"),
        ("127.0.0.1", "a\x1b[8m\nb", "127.0.0.1"),
        ("unknown", "203.0.113.9", "unknown"),
        ("127.0.0.1", "9," * 100_000, "127.0.0.1"),
    ],
)
def test_who_asks(peer: str, forwarded: str, client: str) -> None:
    assert PROXIES.client(peer, forwarded) == client


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(addresses, st.text() | st.lists(addresses).map(", ".join))
def test_nobody_but_a_proxy_can_say_who_asks(peer: str, forwarded: str) -> None:
    if not PROXIES.trusts(peer):
        assert PROXIES.client(peer, forwarded) == peer
    assert Serving().client(peer, forwarded) == peer


@given(addresses.filter(lambda one: not PROXIES.trusts(one)), st.lists(addresses).map(", ".join))
def test_whatever_a_client_writes_the_proxy_has_the_last_word(client: str, written: str) -> None:
    assert PROXIES.client("127.0.0.1", f"{written}, {client}") == str(ip_address(client))


SERVING = Serving(public_url="https://f.example:444/a", hosts=("Other.Example", "192.0.2.8", "2001:db8::8"))


@pytest.mark.parametrize(
    "name",
    [
        *("localhost", "localhost:8765", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:80", "::1"),
        *("f.example", "F.EXAMPLE:1", "f.example.", "other.example", "192.0.2.8:80", "[2001:db8::8]:1"),
        *("192.0.2.7:8765", "[::ffff:192.0.2.7]:1", "[2001:0db8:0::8]"),
    ],
)
def test_its_names(name: str) -> None:
    assert SERVING.is_host(name, "0.0.0.0", "192.0.2.7")


@pytest.mark.parametrize(
    "name",
    [
        *("", ":", "evil.example", "f.example.evil.example", "xf.example", "127.0.0.1.evil.example"),
        *("192.0.2.9", "[::2]", "[", "0", "localhost.evil.example", "f.example@evil.example", "2130706433"),
    ],
)
def test_names_of_others(name: str) -> None:
    assert not SERVING.is_host(name, "", "192.0.2.7")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hosts": ("https://f.example",)}, "serving.hosts: 'https://f.example' is not a host"),
        ({"hosts": ("f.example:80",)}, "is not a host; write it without scheme and port"),
        ({"hosts": ("",)}, "is not a host"),
        ({"trusted_proxies": ("nginx",)}, "'nginx' is neither an address nor a network like 10.0.0.0/8"),
        ({"trusted_proxies": ("10.0.0.0/33",)}, "is neither an address nor a network"),
        ({"path_prefix": "a"}, "serving.path_prefix is 'a'; write it like /federation"),
        ({"path_prefix": "/a/"}, "serving.path_prefix"),
        ({"path_prefix": "/a/{id}"}, "serving.path_prefix"),
        ({"public_url": "f.example"}, "serving.public_url: 'f.example' is no address"),
        ({"public_url": "https://f.example/#t"}, "serving.public_url"),
    ],
)
def test_what_cannot_be_is_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as raised:
        Serving(**settings)  # type: ignore[arg-type]
    assert said in str(raised.value)
