"""Where TLS is, what is announced to devices, and flags that contradict each other."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from coordinator.listening import Serving
from coordinator.settings import load_settings
from coordinator.storage.store import Store
from coordinator.upkeep.announcement import Announcement, announce, announced
from coordinator.upkeep.data_folder import KEY_FILE
from coordinator.web.endpoint import Endpoint
from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import parse
from tests.certificates import pair
from tests.coordinator.devices import configuration
from tests.processes import CoordinatorProcess, command

PROXIES = Serving(trusted_proxies=("10.0.0.0/8",))


@pytest.mark.parametrize(
    ("asked", "has_tls"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.0.2.7"}, True),
        ({"host": "host.example"}, True),
        ({"tls": True}, True),
        ({"host": "0.0.0.0", "insecure": True}, False),
        ({"host": "0.0.0.0", "serving": PROXIES}, False),
        ({"host": "0.0.0.0", "serving": PROXIES, "tls": True}, True),
        ({"serving": PROXIES}, False),
    ],
)
def test_where_tls_is(tmp_path: Path, asked: dict[str, Any], has_tls: bool) -> None:
    found = Endpoint(**asked).certificate(tmp_path)
    assert bool(found) == has_tls
    assert (tmp_path / KEY_FILE).exists() == has_tls
    assert len(found.pin if found else "") == (43 if has_tls else 0)


def test_the_hosts_own_certificate_is_used_as_it_is(tmp_path: Path) -> None:
    own = pair(tmp_path / "own", "own", "host.example")
    found = Endpoint("0.0.0.0", cert=own.cert_file, key=own.key_file).certificate(tmp_path)
    assert found is not None
    assert (found.certificate, found.key, found.pin) == (own.cert_file, own.key_file, "")
    assert not (tmp_path / KEY_FILE).exists()


@pytest.mark.parametrize(
    ("host", "serving", "own", "url", "pin", "insecure"),
    [
        ("192.0.2.7", Serving(), True, "https://192.0.2.7:8765", "P" * 43, False),
        ("2001:db8::7", Serving(), True, "https://[2001:db8::7]:8765", "P" * 43, False),
        ("Host.Example", Serving(path_prefix="/f"), True, "https://host.example:8765/f", "P" * 43, False),
        ("127.0.0.1", Serving(), False, "http://127.0.0.1:8765", "", False),
        ("192.0.2.7", Serving(), False, "http://192.0.2.7:8765", "", True),
        ("0.0.0.0", Serving(public_url="https://f.example/a/"), True, "https://f.example/a", "P" * 43, False),
        ("127.0.0.1", Serving(public_url="https://f.example"), False, "https://f.example", "", False),
        ("0.0.0.0", Serving(public_url="http://f.example"), False, "http://f.example", "", True),
    ],
)
def test_what_devices_are_told(
    tmp_path: Path, host: str, serving: Serving, own: bool, url: str, pin: str, insecure: bool
) -> None:
    from coordinator.web.tls import Certificate

    certificate = Certificate(tmp_path, tmp_path, "P" * 43) if own else None
    said = Endpoint(host, 0, serving=serving).announcement(8765, certificate)
    assert said == Announcement(url, pin, insecure)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, ""),
        ({"host": "0.0.0.0"}, ""),
        ({"host": "0.0.0.0", "insecure": True}, "plain HTTP to other machines"),
        ({"serving": PROXIES}, "put its address into serving.public_url"),
        ({"serving": Serving("https://f.example", trusted_proxies=("127.0.0.1",))}, ""),
        ({"host": "0.0.0.0", "serving": Serving("https://f.example", trusted_proxies=("::1",))}, ""),
    ],
)
def test_what_its_host_is_told(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    endpoint = Endpoint(**asked)
    told = endpoint.notices(endpoint.certificate(tmp_path))
    assert len(told) == bool(said)
    assert said in "".join(told)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_machine_that_listens_everywhere_is_told_by_an_address(host: str, tmp_path: Path) -> None:
    said = Endpoint(host).announcement(8765, None).url
    assert "0.0.0.0" not in said
    assert "[::]" not in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"insecure": True, "tls": True}, "--insecure means no TLS; leave out --tls"),
        ({"insecure": True, "cert": Path("x")}, "--insecure means no TLS; leave out --cert"),
        ({"key": Path("x")}, "--key is the key of a certificate"),
    ],
)
def test_flags_that_contradict_each_other(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Endpoint(**asked)


def test_the_folder_says_where_its_coordinator_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows")
    with pytest.raises(InputError, match="no address is known yet"):
        announced(store, tmp_path)
    said = Announcement("https://h:8765", "P" * 42 + "A")
    for one in (said, said, Announcement("http://h", "", True)):
        announce(store, one)
        assert announced(store, tmp_path) == one
    assert announced(store, tmp_path).command("t") == (
        "edge-sdk join 'flexlora+http://h/#t' --insecure --data notes.jsonl"
    )
    store.set_meta("announcement", "{")
    with pytest.raises(InputError, match="no address is known yet"):
        announced(store, tmp_path)
    store.close()


def test_a_start_writes_it_down_and_prints_a_command_that_works(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path, configuration(tmp_path), "--host", "::1", "--tls") as coordinator:
        store = Store(coordinator.data / "coordinator.sqlite", upgrade=False)
        said = announced(store, coordinator.data)
        store.close()
        assert said.url == f"https://[::1]:{coordinator.port}"
        assert (parse(str(said.invitation("t"))).pin, said.insecure) == (coordinator.pin, False)
        assert stat.S_IMODE((coordinator.data / KEY_FILE).stat().st_mode) == 0o600
        arguments = ("--data", __file__, "--state", tmp_path / "state", "--dry-run")
        done = command("edge_sdk.cli", "join", said.invitation("wrong"), *arguments)
        assert "not JSON" in done.stderr  # the data, which are read first
        assert "EOF" not in coordinator.log.read_text()


def test_serving_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        "[serving]\npublic_url = 'https://f.example/a'\nhosts = ['f.example', '10.0.0.1']\n"
        "trusted_proxies = ['10.0.0.0/8', '::1']\npath_prefix = '/a'\n"
    )
    found = load_settings(path).serving
    assert found == Serving("https://f.example/a", ("f.example", "10.0.0.1"), ("10.0.0.0/8", "::1"), "/a")
