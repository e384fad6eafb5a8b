"""Where a command is told to go: an invitation from anywhere, or an address with a token."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from edge_sdk.commands import destination
from edge_sdk.commands.destination import INVITATION_VARIABLE, TOKEN_VARIABLE, Destination, find
from edge_sdk.commands.device_config import load_device_config
from edge_sdk.core.errors import InputError
from edge_sdk.core.invitation import parse, pin_of

TEXT = f"flexlora+https://host:8765/#t0ken.{pin_of(b'key')}"
INVITED = Destination("https://host:8765", "t0ken", parse(TEXT))


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (INVITATION_VARIABLE, TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_an_invitation_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "invitation"
    file.write_text(f"\n{TEXT}\n")
    assert find(TEXT) == find(f"@{file}") == INVITED
    monkeypatch.setattr(destination.sys, "stdin", io.StringIO(f"{TEXT}\nthe first prompt\n"))
    assert find("-") == INVITED
    assert destination.sys.stdin.readline() == "the first prompt\n"  # what follows is for others
    monkeypatch.setenv(INVITATION_VARIABLE, TEXT)
    assert find(None) == INVITED
    assert find("https://other") == Destination("https://other")  # what is said counts


def test_an_address_takes_a_token_from_flag_file_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "env")
    assert find("https://h", "flag", "file") == Destination("https://h", "flag")
    assert find("https://h", None, "file") == Destination("https://h", "file")
    assert find("https://h") == Destination("https://h", "env")
    assert find(None, "flag") is None


def test_what_an_agent_is_given() -> None:
    assert INVITED.for_agent() == {"url": TEXT}
    assert Destination("https://h", "t").for_agent() == {"url": "https://h", "join_token": "t"}
    assert (INVITED.pin, Destination("https://h").pin) == (pin_of(b"key"), "")


def test_an_invitation_brings_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "env")
    assert find(TEXT, None, "file") == INVITED
    with pytest.raises(InputError, match="an invitation brings its own token; leave out --token"):
        find(TEXT, "flag")


def test_what_holds_no_invitation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "f"
    for content, said in (
        (b"", "f: that is no invitation"),
        (b"\xff\xfe", "f: no invitation, for it is not text"),
        (b"https://host", "f: that is no invitation"),
        (TEXT.encode()[:-1], "f: the pin is not whole"),
        (b"x" * 10_000_000, "f: that is no invitation"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="^[^\n]+$") as raised:
            find(f"@{file}")
        assert said in str(raised.value)
    for place, said in (
        (f"@{tmp_path / 'gone'}", "No such file"),
        ("@", "cannot be read"),
        (f"@{tmp_path}", "cannot be"),
    ):
        with pytest.raises(InputError, match=said):
            find(place)
    monkeypatch.setattr(destination.sys, "stdin", io.StringIO(""))
    with pytest.raises(InputError, match="^standard input: that is no invitation"):
        find("-")
    monkeypatch.setenv(INVITATION_VARIABLE, "nothing")
    with pytest.raises(InputError, match=f"^{INVITATION_VARIABLE}: that is no invitation"):
        find(None)


def test_a_configuration_file_names_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "invitation").write_text(TEXT)
    config = tmp_path / "device.toml"
    config.write_text('url = "@invitation"\ninsecure = true\nca = "ca.pem"\n')
    found = load_device_config(config)
    assert find(found.url) == INVITED
    assert found.options().ca == tmp_path / "ca.pem"
    assert found.options().insecure
    config.write_text(f'url = "{TEXT}"\n')
    assert find(load_device_config(config).url) == INVITED
