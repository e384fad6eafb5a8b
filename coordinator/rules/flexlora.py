"""FlexLoRA as published: average what devices hold, whatever their ranks."""

from __future__ import annotations

from dataclasses import replace

from coordinator.rules.rule import Addends, Change, Merging, Ranks, SumRule
from edge_sdk.core.lora import LoraFactors, stacked


class FlexLora(SumRule):
    """G ← Σ w_k B̃_k A_k (Bai et al., NeurIPS 2024, arXiv:2402.11505, section 3.2).

    Devices train their truncation of the global adapter itself, and their states are averaged: a device of
    rank 8 pulls the other components of everybody towards zero (raFLoRA, arXiv:2602.13486, proves that the
    average collapses to the smallest shared rank). With η < 1 the old global adapter keeps the
    share 1 − η, which is not in the paper.
    """

    warms_up = True

    def addends(self, merging: Merging) -> Addends:
        """The states, and with η ≠ 1 what stays of the old."""
        eta = merging.eta
        kept: Addends = [(1.0 - eta, merging.current)] if merging.current.rank and eta != 1.0 else []
        return [*kept, *((eta * change.weight, change.factors) for change in merging.changes)]

    def stacked_rank(self, ranks: Ranks, eta: float) -> int:
        """All updates; the old global adapter where some of it stays."""
        return sum(ranks.updates) + (ranks.current if eta != 1.0 else 0)

    def shorter(self, change: Change, factor: float, begun: LoraFactors) -> Change:
        """Begun + factor · (state − begun): a smaller weight would shrink what everybody knows as well."""
        return replace(change, factors=stacked([(factor, change.factors), (1.0 - factor, begun)]))

    def shorter_rank(self, rank: int, begun: int) -> int:
        """The state beside what it began as."""
        return rank + begun
