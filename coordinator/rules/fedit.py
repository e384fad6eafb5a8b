"""Plain averaging of the factors themselves, for federations in which all devices have one rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.rules.rule import Change, Merging, NewFactors, Ranks, Rule
from edge_sdk.core.flexlora import Split, pad
from edge_sdk.core.lora import LoraFactors


class FedIt(Rule):
    """B ← Σ w_k B̃_k,  A ← Σ w_k A_k (FedIT, Zhang et al., ICASSP 2024, arXiv:2305.05644, algorithm 1).

    The product of averages is not the average of products: with unlike devices it holds cross terms
    B̃_j A_k that nobody trained. Version 0 gives all devices one A, which keeps these small at first. A
    module that came back at a lower rank, from a device out of memory, counts as filled up with zeros.
    """

    def objection(self, ladder: Sequence[int], mixed: bool, rank_cap: int, widest: int) -> str:
        """All devices must have one rank."""
        if len(ladder) == 1 and not mixed:
            return ""
        return (
            "rule fedit averages factors of one rank; give federation.ladder one rank and no mixed_ranks, or "
            "choose another rule"
        )

    def weights(self, changes: Sequence[Change]) -> list[float]:
        """The engine's."""
        return [change.weight for change in changes]

    def merge(self, merging: Merging, rank: int) -> NewFactors:
        """Average B and A apart. Nothing is decomposed, so that components keep their places."""
        eta, shares = merging.eta, self.weights(merging.changes)
        parts = [(eta * w, change.factors) for w, change in zip(shares, merging.changes, strict=True)]
        parts += [(1.0 - eta, merging.current)] if merging.current.rank and eta != 1.0 else []
        out_features, in_features = merging.changes[0].factors.shape
        b, a = np.zeros((out_features, rank)), np.zeros((rank, in_features))
        for weight, factors in parts:
            b[:, : factors.rank] += weight * factors.b
            a[: factors.rank] += weight * factors.a
        mean = LoraFactors(b.astype(np.float32), a.astype(np.float32))
        return NewFactors(mean, rank, mean.norm() ** 2)

    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """That of the widest update; settings keep the cap at or above it."""
        return min(max(*ranks.updates, ranks.current if eta != 1.0 else 0), *shape)

    def serve(self, stored: LoraFactors, rank: int, how: Split, seed: str) -> LoraFactors:
        """The first components, as they are: these have no singular values to order or split by."""
        return pad(stored.leading(rank), rank, seed)
