"""One published version from its updates: streamed module by module, so that memory holds one module's stack.

Runs in a worker thread; touches only the blobs it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.privacy import Noise, clip_factor, noised, squared_norm_bound
from coordinator.rules import carry, merge_module, relearnt
from edge_sdk.core.codec import AdapterFile, encode_chunks, open_adapter, open_own
from edge_sdk.core.errors import AdapterError, EdgeError
from edge_sdk.core.flexlora import live_rank, serve
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation


class BadUpdate(Exception):
    """An acknowledged update cannot be read back; the others still count."""

    def __init__(self, update: str, reason: str) -> None:
        super().__init__(f"update {update}: {reason}")
        self.update = update
        self.reason = reason


@dataclass(frozen=True)
class Addend:
    """An update on disk: its id, weight, file and the rank that it was trained at.

    `start`: the version that it was trained from, where its device carried only `carry_rank` components of
    that; None where there is nothing that it did not see.
    """

    update: str
    weight: float
    path: Path
    rank: int
    start: Path | None = None
    carry_rank: int = 0


@dataclass
class Outcome:
    """What a merge wrote. Energies sum σ² over modules; `rank` is the largest live rank."""

    digest: str = ""
    rank: int = 0
    energy: float = 0.0
    discarded_energy: float = 0.0


def aggregate(
    federation: Federation,
    eta: float,
    current: Path | None,
    addends: Sequence[Addend],
    blobs: Blobs,
    noise: Noise | None = None,
) -> Outcome:
    """Merge `addends` into the global adapter `current` (None for version 0) and store the result as a blob.

    With `noise`, each update is clipped first and the sum noised: see privacy.py.

    Raises:
        BadUpdate: an update's file is broken; nothing is stored.
    """
    shapes = federation.base.modules
    files = [(addend, _open(addend, federation)) for addend in addends]
    if noise:
        files = [_clipped(addend, file, noise.clip_norm) for addend, file in files]
    own = open_own(current, federation.scaling) if current else None
    # Versions of which some devices did not see all: one block more in the stack for each.
    partly = {addend.start: open_own(addend.start, federation.scaling) for addend in addends if addend.start}
    ranks = {}
    for name, shape in shapes.items():
        stacked = sum(file.ranks[name] for _, file in files)
        stacked += sum(file.ranks[name] for file in partly.values())
        keeps_old = own is not None and not (federation.rule == "flexlora" and eta == 1.0)
        stacked += own.ranks[name] if own and keeps_old else 0
        ranks[name] = min(federation.rank_cap, *shape, *([] if noise else [stacked]))
    outcome = Outcome()
    modules = _merged_modules(federation, eta, own, (files, partly), noise, outcome)
    outcome.digest = blobs.write(encode_chunks(shapes, ranks, federation.scaling, modules))
    return outcome


def _open(addend: Addend, federation: Federation) -> AdapterFile:
    try:
        size = addend.path.stat().st_size
        return open_adapter(addend.path, federation.base.modules, addend.rank, federation.scaling, size)
    except (OSError, EdgeError) as error:
        raise BadUpdate(addend.update, str(error)) from error


def _clipped(addend: Addend, file: AdapterFile, clip_norm: float) -> tuple[Addend, AdapterFile]:
    """The addend with its weight lowered, where its change is longer than `clip_norm` over all modules."""
    try:
        factor = clip_factor(sum(squared_norm_bound(factors) for _, factors in file.modules()), clip_norm)
    except AdapterError as error:
        raise BadUpdate(addend.update, str(error)) from error
    return replace(addend, weight=factor * addend.weight), file


def _merged_modules(
    federation: Federation,
    eta: float,
    own: AdapterFile | None,
    sources: tuple[Sequence[tuple[Addend, AdapterFile]], Mapping[Path, AdapterFile]],
    noise: Noise | None,
    outcome: Outcome,
) -> Iterator[tuple[str, LoraFactors]]:
    """The merged factors in name order; adds up what the outcome reports on the way.

    `sources`: the updates' files, and those of the versions that devices carried only a part of.
    """
    files, partly = sources
    for name in sorted(federation.base.modules):
        updates: list[tuple[float, LoraFactors]] = []
        unseen: dict[Path, list[tuple[float, int, LoraFactors]]] = {start: [] for start in partly}
        for addend, file in files:
            try:
                factors = file.module(name)
            except AdapterError as error:
                raise BadUpdate(addend.update, str(error)) from error
            updates.append((addend.weight, factors))
            if addend.start:
                unseen[addend.start].append((addend.weight, addend.carry_rank, factors))
        current = own.module(name) if own else None
        again = [relearnt(partly[start].module(name), parts) for start, parts in unseen.items()]
        if noise:
            rank = min(federation.rank_cap, *federation.base.modules[name])
            merged = noised(carry(current, updates, eta, again), eta * noise.std, rank, noise.normals)
        else:
            merged = merge_module(federation.rule, current, updates, eta, federation.rank_cap, again)
        outcome.rank = max(outcome.rank, live_rank(merged.factors))
        outcome.energy += merged.energy
        outcome.discarded_energy += merged.discarded_energy
        yield name, merged.factors


def write_served(
    federation: Federation, version: int, current: Path | None, rank: int, path: str, blobs: Blobs
) -> Path:
    """Make the file that devices of `rank` start version `version` from; the same bytes for everyone."""
    shapes = federation.base.modules
    ranks = {name: min(rank, *shape) for name, shape in shapes.items()}

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        own = open_own(current, federation.scaling) if current else None
        for name in sorted(shapes):
            canonical = own.module(name) if own else LoraFactors.empty(*shapes[name])
            seed = f"{federation.id}/{version}/{name}"
            yield name, serve(canonical, ranks[name], federation.split, seed)

    return blobs.write_cached(path, encode_chunks(shapes, ranks, federation.scaling, modules()))
