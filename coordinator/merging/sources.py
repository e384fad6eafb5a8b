"""The files of a merge, open: the newest version, the updates, and the versions that these started from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.rules.named import rule_named, served
from coordinator.rules.rule import Change, Merging, Ranks, Rule
from edge_sdk.core.adapter_file.codec import AdapterFile, open_adapter, open_own
from edge_sdk.core.errors import EdgeError
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation
from edge_sdk.core.svd.decompose import decompose


@dataclass(frozen=True)
class StartVersion:
    """A version that work began from, and its global adapter.

    No file for version 0, nor where the rule needs none.
    """

    version: int
    path: Path | None = None


@dataclass(frozen=True)
class Addend:
    """An update on disk: its id, weight, file, the rank that it was trained at, and what it started from.

    `factor`: how much of its change is merged. Below 1 under a rule that merges states, `start` has a file.
    """

    update: str
    weight: float
    path: Path
    rank: int
    start: StartVersion = StartVersion(0)
    carry_rank: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Sources:
    """The files of a merge, open: the newest version, the updates, the versions that the rule asked for."""

    federation: Federation
    rule: Rule
    current: StartVersion
    own: AdapterFile | None
    updates: Sequence[tuple[Addend, AdapterFile]]
    starts: Mapping[int, AdapterFile]
    by: Decompose = decompose

    def ranks(self, name: str) -> Ranks:
        """The ranks that meet in one module."""
        return Ranks(
            updates=[self._rank(addend, file, name) for addend, file in self.updates],
            current=self.own.ranks[name] if self.own else 0,
            version=self.current.version,
            starts={version: file.ranks[name] for version, file in self.starts.items()},
        )

    def merging(self, name: str, shape: tuple[int, int], eta: float) -> Merging:
        """One module, read.

        Raises:
            AdapterError: a value of an update is not finite.
        """
        starts = {version: file.module(name) for version, file in self.starts.items()}
        nothing = LoraFactors.empty(*shape)
        changes = []
        for addend, file in self.updates:
            version = addend.start.version
            change = Change(addend.weight, file.module(name), version, addend.carry_rank)
            if addend.factor < 1.0:
                change = self.rule.shorter(change, addend.factor, self.begun(name, change, starts))
            changes.append(change)
        current = self.own.module(name) if self.own else nothing
        return Merging(current, changes, self.current.version, starts, eta, self.by)

    def _rank(self, addend: Addend, file: AdapterFile, name: str) -> int:
        """Of what `merging` makes of an update."""
        rank = file.ranks[name]
        if addend.factor == 1.0:
            return rank
        return self.rule.shorter_rank(rank, rank if addend.start.version in self.starts else 0)

    def begun(self, name: str, change: Change, starts: Mapping[int, LoraFactors]) -> LoraFactors:
        """What an update's device was served and trained; of rank 0 where that is nothing."""
        start = starts.get(change.version)
        if start is None or self.rule.carries:
            return LoraFactors.empty(*change.factors.shape)
        return served(self.federation, change.version, name, start, change.factors.rank)

    def whole(self) -> Sources:
        """The same, with the updates as they were sent."""
        return replace(self, updates=[(replace(addend, factor=1.0), file) for addend, file in self.updates])


def open_sources(federation: Federation, current: StartVersion, addends: Sequence[Addend]) -> Sources:
    """All files that a merge needs."""
    scaling = federation.scaling
    return Sources(
        federation,
        rule_named(federation.rule),
        current,
        open_own(current.path, scaling) if current.path else None,
        [(addend, _file(federation, addend)) for addend in addends],
        {a.start.version: open_own(a.start.path, scaling) for a in addends if a.start.path},
    )


def _file(federation: Federation, addend: Addend) -> AdapterFile:
    size = addend.path.stat().st_size
    return open_adapter(addend.path, federation.base.modules, addend.rank, federation.scaling, size)


def faults(federation: Federation, addends: Sequence[Addend]) -> dict[str, str]:
    """What is wrong with updates' files: update -> reason, with the module. Reads every value of them.

    Asked when a merge has failed, so that all bad ones are found at once: each try reads everything again.
    """
    found = {}
    for addend in addends:
        try:
            for _ in _file(federation, addend).modules():
                pass
        except (OSError, EdgeError) as error:
            found[addend.update] = str(error)
    return found
