"""How a device takes part, and what it tells about it."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge_sdk.conditions import Conditions
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.core.profile import DeviceProfile

Kind = Literal[
    "joined",
    "unquantised",
    "rank",
    "waiting",
    "offline",
    "training",
    "step",
    "delivered",
    "refused",
    "stopped",
    "paused",
    "resumed",
    "adapter",  # a newer version of the global adapter is there
    "notice",
    "disk",  # a file of the state folder cannot be written, or can be again
    "memory",  # training ran out of memory and goes on in a smaller way
]


@dataclass(frozen=True)
class Event:
    """Something that an application or a terminal may want to show."""

    kind: Kind
    text: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    version: int = 0


@dataclass(frozen=True)
class Limits:
    """What a federation may ask of this device; one that asks for more is refused before anything is fetched.

    Args:
        bases: names of base models, or beginnings of their fingerprints; empty: any.
        most_tokens: of an assignment: steps × batch × sequence length.
        most_download_bytes: of one adapter file.
        least_examples: behind an update: steps × batch. An update of one step of one example is that
            example's gradient, from which its text can be recovered (Zhu et al. 2019, arXiv:1906.08935); the
            more are added up, the less each can be told apart. It is no guarantee: that needs noise.

    Raises:
        InputError: a limit that nothing can meet.
    """

    bases: tuple[str, ...] = ()
    most_tokens: int = 100_000_000
    most_download_bytes: int = 4 << 30
    least_examples: int = 8

    def __post_init__(self) -> None:
        for name in ("most_tokens", "most_download_bytes", "least_examples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} must be 1 or more")


@dataclass(frozen=True)
class Options:
    """How a device takes part; every field has a calm default."""

    name: str = field(default_factory=platform.node)
    model: str | None = None  # default: the federation's own
    trust_remote_code: bool = False  # whether code that comes with the base model may run here
    state_dir: Path | None = None  # default: a folder below the user's cache
    profile: DeviceProfile | None = None  # default: measured
    memory_budget_bytes: int | None = None  # default: half of what is free
    budget_covers_libraries: bool = True  # whether the budget is of the whole process that trains
    ranks: Ranks | None = None  # default: the largest of the federation's ladder that fits
    duty: float = 1.0  # share of the time that may be spent computing
    threads: int = 1
    nice: int = 10  # of the thread that trains, where the system has that; 0 leaves it alone
    conditions: Conditions = field(default_factory=Conditions)  # under which to train; default: any
    limits: Limits = field(default_factory=Limits)  # what a federation may ask for
    ca: Path | None = (
        None  # PEM file of the authorities that may vouch for the coordinator; default: the system's
    )
    insecure: bool = False  # whether secrets and adapters may leave this machine without TLS
    device: str = "auto"  # torch device
    isolate: bool = True  # train in a process of its own; False where no interpreter can be started
    quantise: bool = True  # where it works; a trial says whether it does
    progress: bool | None = False  # bars on stderr; None shows them on a terminal

    def __post_init__(self) -> None:
        if not 0 < self.duty <= 1:
            raise InputError(f"duty {self.duty} must be above 0 and at most 1")
        if self.threads < 1:
            raise InputError(f"threads {self.threads} must be 1 or more")
        if not 0 <= self.nice <= 19:
            raise InputError(f"nice {self.nice} must be from 0 (as important as any) to 19 (least important)")
        if self.memory_budget_bytes is not None and self.memory_budget_bytes < 1:
            raise InputError(f"memory budget {self.memory_budget_bytes} must be above 0")


def cache_dir() -> Path:
    """Where devices keep what they need between starts, as the XDG base directory specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "edge-sdk"


def default_state_dir(url: str, name: str) -> Path:
    """Where a device keeps its state unless told otherwise: one folder for each coordinator and name."""
    label = hashlib.sha256(f"{url}\n{name}".encode()).hexdigest()[:12]
    return cache_dir() / label
