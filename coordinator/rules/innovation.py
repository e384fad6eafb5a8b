"""Merge what devices changed in the truncation of the global adapter that they were given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coordinator.rules.rule import Addends, Merging, Ranks, SumRule
from edge_sdk.core.lora import LoraFactors


class Innovation(SumRule):
    """G ← G + η Σ w_k D_k,  D_k = B̃_k A_k − T_{r_k}(G_v).

    T_r keeps the r largest components, which is what a device of rank r was served and then trained. With
    equal versions, η = 1 and every r_k at least the rank of G this is the published average.

    What is subtracted of one version shares its factors: Σ_k w_k T_{r_k}(G_v) = U diag(S_i c_i) Vᵀ, where c_i
    is the weight of all devices that were given component i. So the stack grows by one block for each
    distinct version, however many devices; for the current version that block is G's own.

    FedHL (arXiv:2505.18494), which aggregates on the basis of the full-rank global model, reads like it from
    its abstract; its formula was not compared.
    """

    adds_changes = True

    def needs_start(self, rank: int, carry_rank: int, live: int) -> bool:
        """Always: a state says nothing of the change without its start."""
        return True

    def addends(self, merging: Merging) -> Addends:
        """G less what the devices of its own version began with, the states, and the older starts."""
        current = merging.current
        kept: Addends = []
        if current.rank:
            own = given(merging, merging.version, current.rank)
            kept = [(1.0, LoraFactors(current.b * (1.0 - merging.eta * own), current.a))]
        states = [(merging.eta * change.weight, change.factors) for change in merging.changes]
        older: Addends = []
        for version, start in sorted(merging.starts.items()):
            if version != merging.version:
                shares = given(merging, version, start.rank)
                older.append((-merging.eta, LoraFactors(start.b * shares, start.a)))
        return [*kept, *states, *older]

    def stacked_rank(self, ranks: Ranks, eta: float) -> int:
        """All updates, the global adapter, and each older version once."""
        older = sum(rank for version, rank in ranks.starts.items() if version != ranks.version)
        return sum(ranks.updates) + ranks.current + older


def given(merging: Merging, version: int, rank: int) -> npt.NDArray[np.float64]:
    """c_i for each component i < rank of `version`: the weight of the devices that began with it, (rank,)."""
    shares = np.zeros(rank)
    for change in merging.changes:
        if change.version == version:
            shares[: change.factors.rank] += change.weight
    return shares
