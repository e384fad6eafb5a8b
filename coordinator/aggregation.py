"""One published version from its updates: streamed, so that memory holds a few modules' stacks, one a core.

Runs in a worker thread and starts others; touches only the blobs it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.parallel import cores, in_order
from coordinator.rules import RULES, Change, Merged, Merging, Ranks
from edge_sdk.core.codec import AdapterFile, encode_chunks, open_adapter, open_own
from edge_sdk.core.errors import AdapterError, EdgeError
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation


class BadUpdate(Exception):
    """An acknowledged update cannot be read back; the others still count."""

    def __init__(self, update: str, reason: str) -> None:
        super().__init__(f"update {update}: {reason}")
        self.update = update
        self.reason = reason


@dataclass(frozen=True)
class Start:
    """A version and its global adapter; no file for version 0, and where the rule needs none."""

    version: int
    path: Path | None = None


@dataclass(frozen=True)
class Addend:
    """An update on disk: its id, weight, file, the rank that it was trained at, and what it started from."""

    update: str
    weight: float
    path: Path
    rank: int
    start: Start = Start(0)
    carry_rank: int = 0


@dataclass
class Outcome:
    """What a merge wrote. Energies sum σ² over modules; `rank` is the largest live rank."""

    digest: str = ""
    rank: int = 0
    energy: float = 0.0
    discarded_energy: float = 0.0


@dataclass(frozen=True)
class Sources:
    """The files of a merge, open: the newest version, the updates, the versions that the rule asked for."""

    current: Start
    own: AdapterFile | None
    updates: Sequence[tuple[Addend, AdapterFile]]
    starts: Mapping[int, AdapterFile]

    def ranks(self, name: str) -> Ranks:
        """The ranks that meet in one module."""
        return Ranks(
            updates=[file.ranks[name] for _, file in self.updates],
            current=self.own.ranks[name] if self.own else 0,
            version=self.current.version,
            starts={version: file.ranks[name] for version, file in self.starts.items()},
        )

    def merging(self, name: str, shape: tuple[int, int], eta: float) -> Merging:
        """One module, read.

        Raises:
            BadUpdate: a value of an update is not finite.
        """
        return Merging(
            current=self.own.module(name) if self.own else LoraFactors.empty(*shape),
            changes=[_change(addend, file, name) for addend, file in self.updates],
            version=self.current.version,
            starts={version: file.module(name) for version, file in self.starts.items()},
            eta=eta,
        )


def aggregate(
    federation: Federation, eta: float, current: Start, addends: Sequence[Addend], blobs: Blobs
) -> Outcome:
    """Merge `addends` into the global adapter `current` and store the result as a blob.

    Raises:
        BadUpdate: an update's file is broken; nothing is stored.
    """
    shapes, rule = federation.base.modules, RULES[federation.rule]
    scaling = federation.scaling
    sources = Sources(
        current,
        open_own(current.path, scaling) if current.path else None,
        [(addend, _open(addend, federation)) for addend in addends],
        {a.start.version: open_own(a.start.path, scaling) for a in addends if a.start.path},
    )
    ranks = {
        name: rule.stored_rank(sources.ranks(name), shape, federation.rank_cap, eta)
        for name, shape in shapes.items()
    }
    outcome = Outcome()

    def merged_module(name: str) -> Merged:
        return rule.merge(sources.merging(name, shapes[name], eta), ranks[name])

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        """The merged factors in name order; adds up what the outcome reports on the way."""
        names = sorted(shapes)
        for name, merged in zip(names, in_order(merged_module, names, cores()), strict=True):
            outcome.rank = max(outcome.rank, merged.rank)
            outcome.energy += merged.energy
            outcome.discarded_energy += merged.discarded_energy
            yield name, merged.factors

    outcome.digest = blobs.write(encode_chunks(shapes, ranks, scaling, modules()))
    return outcome


def _open(addend: Addend, federation: Federation) -> AdapterFile:
    try:
        size = addend.path.stat().st_size
        return open_adapter(addend.path, federation.base.modules, addend.rank, federation.scaling, size)
    except (OSError, EdgeError) as error:
        raise BadUpdate(addend.update, str(error)) from error


def _change(addend: Addend, file: AdapterFile, name: str) -> Change:
    try:
        factors = file.module(name)
    except AdapterError as error:
        raise BadUpdate(addend.update, str(error)) from error
    return Change(addend.weight, factors, addend.start.version, addend.carry_rank)
