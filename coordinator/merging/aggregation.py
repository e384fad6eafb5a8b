"""One published version from its updates: streamed, so that memory holds a few modules' stacks, one a core.

Runs in a worker thread and starts others; reads only the files that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coordinator.merging.parallel import cores, in_order
from coordinator.merging.sources import Addend, Sources, StartVersion, faults, open_sources
from coordinator.merging.weighing import AsGiven, Weighing
from coordinator.rules.rule import NewFactors
from coordinator.storage.blobs import Writer
from edge_sdk.core.adapter_file.codec import encode_chunks
from edge_sdk.core.errors import AdapterError, BadUpdates, EdgeError
from edge_sdk.core.flexlora import Decompose
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation
from edge_sdk.core.svd.decompose import decompose


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


def aggregate(
    federation: Federation,
    eta: float,
    current: StartVersion,
    addends: Sequence[Addend],
    write: Writer,
    how: Weighing | None = None,
    by: Decompose = decompose,
) -> Outcome:
    """Merge `addends` into the global adapter `current` and store the result as a blob, by `write`.

    `how` weighs them, by default as they are given. `by` decomposes sums without noise.

    Raises:
        AdapterError: there is nothing to merge.
        BadUpdates: files of updates are broken, all of these; nothing is stored.
    """
    if not addends:
        raise AdapterError("nothing to merge: the buffer is empty")
    try:
        sources = replace(open_sources(federation, current, addends), by=by)
        return _aggregate(federation, eta, sources, write, how or AsGiven())
    except (OSError, EdgeError) as error:
        found = faults(federation, addends)
        if not found:
            raise
        raise BadUpdates.of(found) from error


def _aggregate(federation: Federation, eta: float, sources: Sources, write: Writer, how: Weighing) -> Outcome:
    """Weigh the updates, and merge them module by module while the result is written."""
    shapes, sources, rule = federation.base.modules, how.weigh(sources), how.rule(sources.rule)
    ranks = {
        name: rule.stored_rank(sources.ranks(name), shape, federation.rank_cap, eta)
        for name, shape in shapes.items()
    }
    outcome = Outcome(weights=[addend.weight for addend, _ in sources.updates])

    def merged_module(name: str) -> NewFactors:
        return rule.merge(sources.merging(name, shapes[name], eta), ranks[name])

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        """The merged factors in name order; adds up what the outcome reports on the way."""
        names, workers = sorted(shapes), 1 if rule.dense or sources.by is not decompose else cores()
        for name, merged in zip(names, in_order(merged_module, names, workers), strict=True):
            outcome.rank = max(outcome.rank, merged.rank)
            outcome.energy += merged.energy
            outcome.discarded_energy += merged.discarded_energy
            yield name, merged.factors

    outcome.digest = write(encode_chunks(shapes, ranks, federation.scaling, modules()))
    return outcome
