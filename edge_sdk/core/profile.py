"""What a machine is: one frozen record, read from and written to a small TOML file.

A probe fills every field; a file of a device *class* (`profiles/*.toml`) holds what a spec sheet says and
leaves out what only a running machine can know (free memory, free disk, battery, speed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edge_sdk.core import toml_file
from edge_sdk.core.errors import InputError

PROFILE_PACKAGE = "edge_sdk.profiles"  # the top-level folder `profiles/`, as pyproject.toml maps it

# Of a class of which only the total is known, this share of memory counts as free: an idle desktop system
# with a browser holds a few GB, and a guest in the owner's machine should not be what fills the rest.
ASSUMED_FREE_SHARE = 0.5


GemmDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Accelerator:
    """A GPU that PyTorch can train on. `shared`: its memory is the machine's own (Jetson, Apple)."""

    kind: Literal["cuda", "mps", "xpu"]
    name: str
    memory_total_bytes: int
    memory_free_bytes: int | None = None  # None: not measured
    shared: bool = False
    compute_capability: str | None = None  # CUDA: "8.6"
    bf16: bool | None = None  # whether it multiplies bfloat16 natively

    def __post_init__(self) -> None:
        if self.memory_total_bytes <= 0:
            raise InputError(
                f"memory_total_bytes of accelerator {self.name!r} must be positive, "
                f"got {self.memory_total_bytes}"
            )
        if (self.memory_free_bytes or 0) < 0:
            raise InputError(f"memory_free_bytes of accelerator {self.name!r} is negative")


@dataclass(frozen=True)
class DeviceProfile:
    """One machine, or one class of machines. None means: not measured, or there is none."""

    name: str
    system: str  # Linux, Windows, Darwin, Android
    machine: str  # x86_64, AMD64, aarch64, arm64
    cpu: str
    cores: int  # logical CPUs that this process may use
    threads: int  # compute threads that pay: physical cores, less what a CPU quota takes away
    memory_total_bytes: int  # RAM, or the limit of the container
    cpu_features: tuple[str, ...] | None = None  # those that matter for training, by their Linux names
    memory_available_bytes: int | None = None
    swap_total_bytes: int | None = None  # apart from RAM: training never counts on it
    swap_free_bytes: int | None = None
    disk_free_bytes: int | None = None  # where the device keeps its state
    on_battery: bool | None = None
    battery_percent: float | None = None
    gemm_dtype: GemmDtype | None = None  # in which training computes here
    gflops: float | None = None  # sustained by a matrix product in `gemm_dtype` where training would run
    accelerators: tuple[Accelerator, ...] = ()  # the first is the one that training would use

    def __post_init__(self) -> None:
        positive: dict[str, float | None] = {
            "cores": self.cores,
            "threads": self.threads,
            "memory_total_bytes": self.memory_total_bytes,
            "gflops": self.gflops,
        }
        for label, value in positive.items():
            if value is not None and value <= 0:
                raise InputError(f"{label} must be positive, got {value}")
        for label in ("memory_available_bytes", "swap_total_bytes", "swap_free_bytes", "disk_free_bytes"):
            if (getattr(self, label) or 0) < 0:
                raise InputError(f"{label} is negative")
        if self.battery_percent is not None and not 0 <= self.battery_percent <= 100:
            raise InputError(f"battery_percent must be from 0 to 100, got {self.battery_percent}")

    @property
    def accelerator(self) -> Accelerator | None:
        """The one that training would use; None: training runs on the CPU."""
        return self.accelerators[0] if self.accelerators else None

    def trainable_memory_bytes(self) -> int:
        """Memory that training may use: the accelerator's if there is one, and RAM where it is shared.

        Free memory where it was measured, otherwise half of the total.
        """
        ram = _free(self.memory_total_bytes, self.memory_available_bytes)
        if self.accelerator is None:
            return ram
        gpu = _free(self.accelerator.memory_total_bytes, self.accelerator.memory_free_bytes)
        return min(ram, gpu) if self.accelerator.shared else gpu

    def trainable_memory_total_bytes(self) -> int:
        """All memory of where training would run, free or not: what tells classes of machines apart."""
        if self.accelerator is None:
            return self.memory_total_bytes
        return self.accelerator.memory_total_bytes

    def summary(self) -> dict[str, str]:
        """Flat text values for `JoinRequest.profile`, with the accelerator that training would use.

        The name stays here, because a host name can be a person's, and so does the state of the battery.
        """
        values = asdict(self)
        for private in ("name", "accelerators", "on_battery", "battery_percent"):
            del values[private]
        if self.accelerator is not None:
            values.update({f"accelerator.{key}": value for key, value in asdict(self.accelerator).items()})
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in values.items()
            if value is not None
        }


def _free(total_bytes: int, free_bytes: int | None) -> int:
    """What was measured free, or the assumed share of the total."""
    return int(total_bytes * ASSUMED_FREE_SHARE) if free_bytes is None else free_bytes


def to_toml(profile: DeviceProfile) -> str:
    """The profile as TOML text: keys in the order of the record, then a table for each accelerator."""
    values = asdict(profile)
    lines = []
    for accelerator in values.pop("accelerators"):
        lines += ["", "[[accelerators]]", *_lines(accelerator)]
    return "\n".join([*_lines(values), *lines]) + "\n"


def _lines(values: Mapping[str, Any]) -> list[str]:
    """`key = value` lines; None has no TOML form and is left out."""
    return [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]


def _toml_value(value: str | float | tuple[str, ...]) -> str:
    """A string, bool, int, finite float or tuple of strings as TOML.

    A JSON string is a TOML basic string but for DEL, which TOML wants escaped; numbers, booleans and arrays
    agree.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def from_toml(text: str, source: str) -> DeviceProfile:
    """Read a profile; `source` names the file in messages.

    Raises:
        InputError: not TOML, an unknown or missing key, or a value of the wrong type; names file and key.
    """
    return toml_file.parse(DeviceProfile, text, source)


def known_profiles() -> tuple[str, ...]:
    """Names of the device classes that come with the package, sorted."""
    folder = resources.files(PROFILE_PACKAGE)
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_profile(name_or_path: str) -> DeviceProfile:
    """A packaged class by name, or any profile file by path (with a slash or `.toml` in it).

    Raises:
        InputError: no such class (the message lists them) or file, or a bad file.
    """
    if name_or_path in known_profiles():
        entry = resources.files(PROFILE_PACKAGE) / f"{name_or_path}.toml"
        return from_toml(entry.read_text(encoding="utf-8"), f"{name_or_path}.toml")
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) < 2:
        known = ", ".join(known_profiles())
        raise InputError(f"no profile is called {name_or_path!r}; give a .toml file or one of: {known}")
    return toml_file.load(DeviceProfile, path)
