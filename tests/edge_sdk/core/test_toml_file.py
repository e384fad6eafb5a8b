"""Files in TOML: what is read, and the one line that each mistake gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from coordinator.settings import load_settings
from edge_sdk.commands.device_config import DeviceConfig, load_device_config
from edge_sdk.core import toml_file
from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import load_profile


@dataclass(frozen=True)
class Lamp:
    watts: float
    colour: Literal["red", "green"] = "red"


@dataclass(frozen=True)
class Heating:
    on: bool = False
    degrees: float | None = None

    def __post_init__(self) -> None:
        if (self.degrees or 0) > 30:
            raise InputError(f"degrees {self.degrees} is too warm")


@dataclass(frozen=True)
class House:
    name: str
    rooms: int = 1
    floors: tuple[int, ...] = ()
    heating: Heating = field(default_factory=Heating)
    cellar: Heating | None = None
    lamps: tuple[Lamp, ...] = ()


def test_tables_are_records(tmp_path: Path) -> None:
    path = tmp_path / "house.toml"
    path.write_bytes(
        b'\xef\xbb\xbfname = "caf\xc3\xa9"\r\nfloors = [0, 1]\r\n[cellar]\r\ndegrees = 12\r\n'
        b"[[lamps]]\r\nwatts = 4\r\n"
    )
    assert toml_file.load(House, path) == House(
        "café", floors=(0, 1), cellar=Heating(degrees=12.0), lamps=(Lamp(4.0),)
    )
    assert toml_file.parse(House, "\ufeffname = 'x'", "text") == House("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "room = 3",
            (
                "unknown key 'room'; the keys are name, rooms, floors, heating, cellar, lamps; "
                "did you mean 'rooms'?"
            ),
        ),
        ("zzz = 3", "unknown key 'zzz'; the keys are name, rooms, floors, heating, cellar, lamps"),
        ('"a\\nb" = 3', "unknown key 'a\\nb'; the keys are name, rooms, floors, heating, cellar, lamps"),
        (
            "[heating]\ndegree = 3",
            (
                "unknown key 'heating.degree'; the keys are heating.on, heating.degrees; "
                "did you mean 'heating.degrees'?"
            ),
        ),
        (
            "[cellar]\nonn = 3",
            ("unknown key 'cellar.onn'; the keys are cellar.on, cellar.degrees; did you mean 'cellar.on'?"),
        ),
        (
            "[[lamps]]\nwatts = 3\n[[lamps]]\nwatt = 3",
            (
                "unknown key 'lamps[1].watt'; the keys are "
                "lamps[1].watts, lamps[1].colour; did you mean 'lamps[1].watts'?"
            ),
        ),
        ("", "key name is missing"),
        ("name = 'x'\n[[lamps]]", "key lamps[0].watts is missing"),
        ("name = 3", "key name: expected str, got int"),
        ("name = 1979-05-27", "key name: expected str, got date"),
        ("name = 'x'\nrooms = true", "key rooms: expected int, got bool"),
        ("name = 'x'\nrooms = 1.0", "key rooms: expected int, got float"),
        ("name = 'x'\nfloors = ['0']", "key floors[0]: expected int, got str"),
        ("name = 'x'\nfloors = 0", "key floors: expected an array, got int"),
        ("name = 'x'\nheating = 0", "key heating: expected a table, got int"),
        ("name = 'x'\nheating.on = 1", "key heating.on: expected bool, got int"),
        (
            "name = 'x'\n[heating]\ndegrees = inf",
            ("key heating.degrees: expected float, got a number that is not finite"),
        ),
        ("name = 'x'\n[heating]\ndegrees = 31", "degrees 31.0 is too warm"),
        (
            "name = 'x'\n[[lamps]]\nwatts = 1\ncolour = 'blue'",
            ("key lamps[0].colour: 'blue' is not one of 'red', 'green'"),
        ),
        (
            "name = 'x'\nrooms 3",
            ("not a TOML file: Expected '=' after a key in a key/value pair (at line 2, column 7)"),
        ),
        (
            "name = 'x'\n[heating",
            ("not a TOML file: Expected ']' at the end of a table declaration (at the end, line 2)"),
        ),
        ("name = ", "not a TOML file: Invalid value (at the end, line 1)"),
        ("name = 'x'\nname = 'y'", "not a TOML file: Cannot overwrite a value (at the end, line 2)"),
        ("floors = " + "[" * 10_000, "not a TOML file: nested too deeply"),
    ],
    ids=lambda text: text[:40],
)
def test_a_mistake_gives_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        toml_file.parse(House, text, "house.toml")
    assert str(caught.value) == f"house.toml: {said}"


def test_a_number_of_too_many_digits_is_no_toml() -> None:
    with pytest.raises(InputError, match="^house.toml: not a TOML file: Exceeds the limit"):
        toml_file.parse(House, "rooms = " + "9" * 5000, "house.toml")


LOADERS: dict[str, Callable[[Path], Any]] = {
    "device": load_device_config,
    "host": load_settings,
    "profile": lambda path: load_profile(str(path)),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_files_that_cannot_be_read_give_one_line(loader: str, tmp_path: Path) -> None:
    path, load = tmp_path / "mine.toml", LOADERS[loader]
    for content, said in (
        (None, "No such file or directory"),
        (b"# caf\xe9", "not UTF-8 text: byte 5 is wrong"),
        ("# café".encode("utf-16"), "not UTF-8 text: byte 0 is wrong"),
        (b"\n\nkey", "not a TOML file: Expected '=' after a key in a key/value pair (at the end, line 3)"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: {said}"
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(InputError, match=f"^{tmp_path}/a.toml: Is a directory$"):
        load(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("loader", "text", "said"),
    [
        (
            "device",
            "[conditions]\nonmains = true",
            (
                "unknown key 'conditions.onmains'; the keys are "
                "conditions.on_mains, conditions.battery_above, conditions.cpu_below, conditions.hours, "
                "conditions.unmetered; did you mean 'conditions.on_mains'?"
            ),
        ),
        ("device", "duty = 'all'", "key duty: expected float, got str"),
        ("device", "[conditions]\nhours = 22", "key conditions.hours: expected str, got int"),
        ("host", "[storage]\nkeep = 3", "unknown key 'storage.keep'; the keys are storage.keep_versions"),
        (
            "host",
            "[polcy]\nquorum = 3",
            (
                "unknown key 'polcy'; the keys are base, federation, training, "
                "policy, admission, privacy, storage, joining, serving, limits; did you mean 'policy'?"
            ),
        ),
        ("host", "base = 3", "key base: expected str, got int"),
        ("host", "[privacy]", "key privacy.noise_multiplier is missing"),
        ("host", "[federation]\nladder = 2", "key federation.ladder: expected an array, got int"),
        ("host", "[storage]\nkeep_versions = 0", "storage.keep_versions is 0; it must be 1 or more"),
        (
            "profile",
            "[[accelerators]]\nkinds = 'cuda'",
            (
                "unknown key 'accelerators[0].kinds'; the keys are "
                "accelerators[0].kind, accelerators[0].name, accelerators[0].memory_total_bytes, "
                "accelerators[0].memory_free_bytes, accelerators[0].shared, "
                "accelerators[0].compute_capability, accelerators[0].bf16; "
                "did you mean 'accelerators[0].kind'?"
            ),
        ),
    ],
)
def test_the_files_of_hosts_and_devices(loader: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        LOADERS[loader](path)
    assert str(caught.value) == f"{path}: {said}"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("threads = 2\n", encoding="utf-8-sig")
    assert load_device_config(path) == DeviceConfig(threads=2)
    path.write_text("[training]\nsteps = 3\n", encoding="utf-8-sig")
    assert load_settings(path).training.steps == 3
