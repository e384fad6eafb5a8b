"""One published version from its updates: streamed, so that memory holds a few modules' stacks, one a core.

Runs in a worker thread and starts others; reads only the files that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from coordinator.merging.admission import Admission
from coordinator.merging.parallel import cores, in_order
from coordinator.merging.robust import gram, reweight
from coordinator.privacy.mechanism import Noise, clip_factor, noised, squared_norm_bound
from coordinator.rules import RULES, Change, Merged, Merging, Ranks, Rule, SumRule, served
from coordinator.storage.blobs import Writer
from edge_sdk.core.adapter_file.codec import AdapterFile, Shapes, encode_chunks, open_adapter, open_own
from edge_sdk.core.errors import AdapterError, BadUpdates, EdgeError
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation
from edge_sdk.core.svd.decompose import decompose


@dataclass(frozen=True)
class Start:
    """A version and its global adapter; no file for version 0, and where the rule needs none."""

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
    start: Start = Start(0)
    carry_rank: int = 0
    factor: float = 1.0


@dataclass
class Outcome:
    """What a merge wrote. Energies sum σ² over modules; `rank` is the largest live rank.

    `weights`: of the updates, in their order, as they were merged; they sum to 1.
    """

    digest: str = ""
    rank: int = 0
    energy: float = 0.0
    discarded_energy: float = 0.0
    weights: Sequence[float] = ()


@dataclass(frozen=True)
class Sources:
    """The files of a merge, open: the newest version, the updates, the versions that the rule asked for."""

    federation: Federation
    rule: Rule
    current: Start
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
            if addend.factor < 1.0 and isinstance(self.rule, SumRule):
                change = self.rule.shorter(change, addend.factor, self._begun(name, change, starts))
            changes.append(change)
        current = self.own.module(name) if self.own else nothing
        return Merging(current, changes, self.current.version, starts, eta, self.by)

    def _rank(self, addend: Addend, file: AdapterFile, name: str) -> int:
        """Of what `merging` makes of an update."""
        rank = file.ranks[name]
        if addend.factor == 1.0 or not isinstance(self.rule, SumRule):
            return rank
        return self.rule.shorter_rank(rank, rank if addend.start.version in self.starts else 0)

    def _begun(self, name: str, change: Change, starts: Mapping[int, LoraFactors]) -> LoraFactors:
        """What an update's device was served and trained; of rank 0 where that is nothing."""
        start = starts.get(change.version)
        if start is None or self.rule.carries:
            return LoraFactors.empty(*change.factors.shape)
        return served(self.federation, change.version, name, start, change.factors.rank)

    def _whole(self) -> list[tuple[Addend, AdapterFile]]:
        """The updates as they were sent."""
        return [(replace(addend, factor=1.0), file) for addend, file in self.updates]

    def clipped(self, clip_norm: float) -> Sources:
        """The updates, each with the factor that brings its change down to `clip_norm` over all modules.

        The change is measured as it will be summed: less the components of the stored start, to the last bit.

        Raises:
            BadUpdates: a norm is not finite.
        """
        updates = []
        for addend, file in self.updates:
            start, squared = self.starts.get(addend.start.version), 0.0
            for name, factors in file.modules():
                stored = start.module(name) if start else LoraFactors.empty(*factors.shape)
                squared += squared_norm_bound(self.rule.change(factors, stored.leading(factors.rank)))
            try:
                updates.append((replace(addend, factor=clip_factor(squared, clip_norm)), file))
            except AdapterError as error:
                raise BadUpdates.of({addend.update: str(error)}) from error
        return replace(self, updates=updates)

    def reweighted(self, shapes: Shapes, admission: Admission) -> Sources:
        """The updates with robust weights and factors: a pass of its own over the files, before the merge.

        Memory holds the changes of one module, and their (K, K) inner products.
        """
        inner = np.zeros((len(self.updates), len(self.updates)))
        for name, shape in sorted(shapes.items()):
            merging = replace(self, updates=self._whole()).merging(name, shape, 1.0)
            inner += gram(
                [self.rule.change(c.factors, self._begun(name, c, merging.starts)) for c in merging.changes]
            )
        factors = np.array([addend.factor for addend, _ in self.updates])
        weights = np.array([addend.weight for addend, _ in self.updates])
        found = reweight(
            admission.robust, inner * np.outer(factors, factors), weights, admission.trimmed_share
        )
        merged = zip(self.updates, found.weights.tolist(), (factors * found.factors).tolist(), strict=True)
        updates = [(replace(addend, weight=w, factor=f), file) for (addend, file), w, f in merged]
        return replace(self, updates=updates)


def aggregate(
    federation: Federation,
    eta: float,
    current: Start,
    addends: Sequence[Addend],
    write: Writer,
    how: Admission | Noise | None = None,
    by: Decompose = decompose,
) -> Outcome:
    """Merge `addends` into the global adapter `current` and store the result as a blob, by `write`.

    `how` says by which weights, by default by those of the addends; a Noise clips them and noises the sum.
    `by` decomposes sums without noise.

    Raises:
        AdapterError: there is nothing to merge.
        BadUpdates: files of updates are broken, all of these; nothing is stored.
    """
    if not addends:
        raise AdapterError("nothing to merge: the buffer is empty")
    try:
        sources = replace(_open(federation, current, addends), by=by)
        return _aggregate(federation, eta, sources, write, how)
    except (OSError, EdgeError) as error:
        found = faults(federation, addends)
        if not found:
            raise
        raise BadUpdates.of(found) from error


def _aggregate(
    federation: Federation, eta: float, sources: Sources, write: Writer, how: Admission | Noise | None
) -> Outcome:
    """Weigh the updates, and merge them module by module while the result is written."""
    shapes, rule = federation.base.modules, sources.rule
    noise = how if isinstance(how, Noise) else None
    if noise:
        sources = sources.clipped(noise.clip_norm)
    elif isinstance(how, Admission) and how.robust != "none":
        sources = sources.reweighted(shapes, how)
    ranks = {
        name: min(federation.rank_cap, *shape)  # noise has every direction
        if noise
        else rule.stored_rank(sources.ranks(name), shape, federation.rank_cap, eta)
        for name, shape in shapes.items()
    }
    outcome = Outcome(weights=[addend.weight for addend, _ in sources.updates])

    def merged_module(name: str) -> Merged:
        return _merged(rule, sources.merging(name, shapes[name], eta), ranks[name], noise)

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        """The merged factors in name order; adds up what the outcome reports on the way."""
        # A noised module is dense, and an accelerator is one.
        names, workers = sorted(shapes), 1 if noise or sources.by is not decompose else cores()
        for name, merged in zip(names, in_order(merged_module, names, workers), strict=True):
            outcome.rank = max(outcome.rank, merged.rank)
            outcome.energy += merged.energy
            outcome.discarded_energy += merged.discarded_energy
            yield name, merged.factors

    outcome.digest = write(encode_chunks(shapes, ranks, federation.scaling, modules()))
    return outcome


def _merged(rule: Rule, merging: Merging, rank: int, noise: Noise | None) -> Merged:
    """The next factors of one module."""
    if noise is None:
        return rule.merge(merging, rank)
    assert isinstance(rule, SumRule)
    return noised(rule.addends(merging), merging.eta * noise.std, rank, noise.normals)


def _open(federation: Federation, current: Start, addends: Sequence[Addend]) -> Sources:
    """All files that a merge needs."""
    scaling = federation.scaling
    return Sources(
        federation,
        RULES[federation.rule],
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
