"""What a rule is: how the updates of a buffer become the next global adapter, one module at a time.

`w_k` are the engine's weights, which sum to 1; η is the server's learning rate; `G_v` is the global update of
version v, and `D_k` what device k changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from edge_sdk.core.flexlora import Decompose, Split, combine, live_rank, serve
from edge_sdk.core.lora import LoraFactors, stacked
from edge_sdk.core.svd.decompose import decompose

Addends = list[tuple[float, LoraFactors]]


@dataclass(frozen=True)
class Change:
    """One update of one module.

    `factors`: as the device trained them, a state or a change, as the rule has it. `version`: the one that
    they were trained from, of which the device held `carry_rank` components frozen.
    """

    weight: float
    factors: LoraFactors
    version: int = 0
    carry_rank: int = 0


@dataclass(frozen=True)
class Merging:
    """All that decides the next global factors of one module.

    `current`: those of `version`, of rank 0 while nothing has been merged. `starts`: those of each version
    for which `Rule.needs_start` said yes, `version` not excepted; version 0 is zero and never among them.
    `by` decomposes sums.
    """

    current: LoraFactors
    changes: Sequence[Change]
    version: int = 0
    starts: Mapping[int, LoraFactors] = field(default_factory=dict)
    eta: float = 1.0
    by: Decompose = decompose

    def ranks(self) -> Ranks:
        """The ranks that meet."""
        return Ranks(
            [change.factors.rank for change in self.changes],
            self.current.rank,
            self.version,
            {version: start.rank for version, start in self.starts.items()},
        )


@dataclass(frozen=True)
class NewFactors:
    """The next global factors of one module, their live rank, and ‖·‖² of the sum and of what was dropped."""

    factors: LoraFactors
    rank: int
    energy: float
    discarded_energy: float = 0.0


@dataclass(frozen=True)
class Ranks:
    """The ranks that meet in one module: of its updates, of `current`, of `starts`. As in `Merging`."""

    updates: Sequence[int]
    current: int = 0
    version: int = 0
    starts: Mapping[int, int] = field(default_factory=dict)


class Rule(ABC):
    """A merge rule. Stateless: the same merging gives the same factors."""

    carries: bool = False
    """Devices hold the global adapter frozen and train fresh factors on top; otherwise a part of it."""

    sums_products: bool = False
    """The result is a weighted sum of products, so an update can be merged by less than its whole change.

    Between two pairs of factors that are averaged lie products that are longer than both.
    """

    adds_changes: bool = False
    """What an update adds to that sum is what its device changed, so clipping bounds it, as privacy needs."""

    warms_up: bool = False
    """Devices may begin with sparse columns (`[training] sparse_versions`)."""

    dense: bool = False
    """A merge holds one module as a dense matrix, so modules are merged one at a time."""

    def objection(self, ladder: Sequence[int], mixed: bool, rank_cap: int, widest: int) -> str:
        """Why a federation with these ranks cannot be under this rule, with the mend; "" where it can.

        Args:
            ladder: ranks that a device may train, rising.
            mixed: whether ranks may differ between attention and feed-forward layers.
            rank_cap: the rank of the global adapter.
            widest: the most that any module of the base can hold.
        """
        return ""

    def needs_start(self, rank: int, carry_rank: int, live: int) -> bool:
        """Whether an update must be merged together with the version that it was trained from.

        Args:
            rank: that the device trained.
            carry_rank: components that it held frozen.
            live: the live rank of that version, 1 or more.
        """
        return False

    @abstractmethod
    def merge(self, merging: Merging, rank: int) -> NewFactors:
        """The next global factors, of rank `rank`, which is what `stored_rank` said."""

    @abstractmethod
    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """The rank of what `merge` returns, from ranks alone: a file says it before any factors come."""

    def change(self, factors: LoraFactors, begun: LoraFactors) -> LoraFactors:
        """What a device changed: what it trained on top, or its state less the one that it began with.

        Args:
            factors: as it sent them.
            begun: as they were served to it; of rank 0 for version 0.
        """
        return factors if self.carries or not begun.rank else stacked([(1.0, factors), (-1.0, begun)])

    def shorter(self, change: Change, factor: float, begun: LoraFactors) -> Change:
        """The same update with `factor` of its change; `begun` as for `change`.

        A rule that sums no products merges it whole: the host has such updates refused.
        """
        return change

    def shorter_rank(self, rank: int, begun: int) -> int:
        """The rank of what `shorter` returns, from the ranks of the factors and of `begun`."""
        return rank

    def next(self, merging: Merging, rank_cap: int) -> NewFactors:
        """The next global factors of a module that is in memory."""
        shape = merging.changes[0].factors.shape
        return self.merge(merging, self.stored_rank(merging.ranks(), shape, rank_cap, merging.eta))

    def serve(self, stored: LoraFactors, rank: int, how: Split, seed: str) -> LoraFactors:
        """What a device of `rank` gets of stored factors: its start, or what it is to hold frozen."""
        return serve(stored, rank, how, seed)


class SumRule(Rule):
    """A rule whose result is a weighted sum of products: each says its addends, all share one SVD.

    What is stored is canonical: `b = U·S` with falling S, `a = Vᵀ`.
    """

    sums_products = True

    def shorter(self, change: Change, factor: float, begun: LoraFactors) -> Change:
        """It weighs less where changes are summed. Weights no longer sum to 1: nobody else counts more."""
        return replace(change, weight=factor * change.weight)

    @abstractmethod
    def addends(self, merging: Merging) -> Addends:
        """The stack: one weighted block of factors after the other."""

    @abstractmethod
    def stacked_rank(self, ranks: Ranks, eta: float) -> int:
        """Columns of that stack."""

    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """As many as the stack holds, at most the cap."""
        return min(rank_cap, self.stacked_rank(ranks, eta), *shape)

    def merge(self, merging: Merging, rank: int) -> NewFactors:
        """The best approximation of the sum with `rank` components."""
        combined = combine(self.addends(merging), rank, merging.by)
        live = live_rank(combined.factors)
        return NewFactors(combined.factors, live, combined.energy, combined.discarded_energy)
