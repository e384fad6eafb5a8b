"""How a device takes part, as its owner writes it down: a TOML file, the flags of `join`, or both.

url = "@invitation"               # a file, or the invitation, or once this device has joined an address
data = "notes.jsonl"              # paths are relative to the file
memory_budget = "6GB"
[conditions]
on_mains = true
hours = "22:00-07:00"
[limits]                          # a federation that asks for more is refused
bases = ["HuggingFaceTB/SmolLM2-135M"]
most_download = "500MB"

The flags have the same names and win over the file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edge_sdk.commands.destination import FILE_MARK
from edge_sdk.conditions import Conditions
from edge_sdk.core import toml_file
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import load_profile
from edge_sdk.options import Limits, Options

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PATHS = ("data", "state", "ca")
TRUST = "let code that comes with the base model run on this machine"
Record = TypeVar("Record")


@dataclass(frozen=True)
class LimitsConfig:
    """`[limits]`: what a federation may ask for, as `options.Limits` says; None where nothing was said."""

    bases: tuple[str, ...] = ()
    most_tokens: int | None = None
    most_download: str | None = None  # of one adapter, like 500MB
    least_examples: int | None = None

    def limits(self) -> Limits:
        """As the agent takes them.

        Raises:
            InputError: a value out of range.
        """
        chosen = {
            "bases": self.bases or None,
            "most_tokens": self.most_tokens,
            "most_download_bytes": parse_bytes(self.most_download) if self.most_download else None,
            "least_examples": self.least_examples,
        }
        return Limits(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeviceConfig:
    """Everything that `edge-sdk join` can be told; None where nothing was said."""

    url: str | None = None
    data: str | None = None
    token: str | None = None
    ca: str | None = None
    insecure: bool | None = None
    name: str | None = None
    model: str | None = None
    state: str | None = None
    profile: str | None = None
    memory_budget: str | None = None
    rank: str | None = None  # 8, or attention=30,mlp=200
    duty: float | None = None
    threads: int | None = None
    nice: int | None = None
    updates: int | None = None
    device: str | None = None
    quantise: bool | None = None
    trust_remote_code: bool | None = None
    conditions: Conditions = field(default_factory=Conditions)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def over(self, other: DeviceConfig) -> DeviceConfig:
        """This one, and `other` where this one says nothing."""
        return _over(
            self,
            other,
            conditions=_over(self.conditions, other.conditions),
            limits=_over(self.limits, other.limits),
        )

    def options(self) -> Options:
        """As the agent takes them.

        Raises:
            InputError: a value out of range.
        """
        chosen = {
            "name": self.name,
            "model": self.model,
            "state_dir": Path(self.state) if self.state else None,
            "ca": Path(self.ca) if self.ca else None,
            "insecure": self.insecure,
            "profile": load_profile(self.profile) if self.profile else None,
            "memory_budget_bytes": parse_bytes(self.memory_budget) if self.memory_budget else None,
            "ranks": Ranks.parse(self.rank) if self.rank else None,
            "duty": self.duty,
            "threads": self.threads,
            "nice": self.nice,
            "device": self.device,
            "quantise": self.quantise,
            "trust_remote_code": self.trust_remote_code,
        }
        given: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        limits = self.limits.limits()
        return Options(**given, conditions=self.conditions, limits=limits, progress=None)


def _over(first: Record, second: Record, **settled: Any) -> Record:
    """A record with the fields of `first` where they are not the default, else those of `second`."""
    missing = {
        f.name: getattr(second, f.name)
        for f in dataclasses.fields(first)  # type: ignore[arg-type]
        if f.name not in settled and getattr(first, f.name) == f.default
    }
    return dataclasses.replace(first, **missing, **settled)  # type: ignore[type-var]


def load_device_config(path: Path) -> DeviceConfig:
    """Read a file.

    Raises:
        InputError: no such file, not TOML, an unknown key, or a value that cannot be; names file and key.
    """
    config = toml_file.load(DeviceConfig, path)
    paths: dict[str, Any] = {
        name: str(path.parent / value) for name in PATHS if (value := getattr(config, name))
    }
    if config.url and config.url.startswith(FILE_MARK):
        paths["url"] = FILE_MARK + str(path.parent / config.url.removeprefix(FILE_MARK))
    return dataclasses.replace(config, **paths)


def parse_bytes(text: str) -> int:
    """`6GB`, `512 MiB` or `1000000` as bytes.

    Raises:
        InputError: not a size.
    """
    number = text.strip().rstrip("BbIiKkMmGg").strip()
    unit = text.strip()[len(text.strip().rstrip("BbIiKkMmGg")) :].strip().upper()
    try:
        value = float(number)
    except ValueError as error:
        raise InputError(f"{text!r} is not a size; write it like 6GB or 512MiB") from error
    if unit not in UNITS or not 0 < value < float("inf"):
        raise InputError(f"{text!r} is not a size; write it like 6GB or 512MiB")
    return int(value * UNITS[unit])
