"""Error feedback for uploads that are products: what was tried, measured and left out (docs/WIRE.md).

What a lossy upload lost is added to the next one (Seide et al., Interspeech 2014, "1-Bit Stochastic Gradient
Descent"; Karimireddy et al. 2019, arXiv:1901.09847, algorithm 1). A device's factors begin anew in every
assignment, so that what B and A lost one by one means nothing to the next pair: the residual E is a product
itself, of what was meant less what arrived. With T_r the best approximation of rank r and Q the rounding,

    sent = Q(T_r(D + E)),   E ← D + E − sent        and so   Σ sent + E = Σ D.

The law holds while E is not cut. Its rank then grows by 2r with every upload, until it fills the module.
"""

from __future__ import annotations

from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors


def corrected(trained: LoraFactors, residual: LoraFactors | None) -> LoraFactors:
    """T_r(D + E): what to send for `trained`, of its rank, with what earlier uploads lost."""
    if residual is None or not residual.rank:
        return trained
    return combine([(1.0, trained), (1.0, residual)], trained.rank).factors


def next_residual(
    trained: LoraFactors, residual: LoraFactors | None, received: LoraFactors, rank_cap: int
) -> LoraFactors:
    """D + E − sent, of rank `rank_cap` at most. `received`: the factors that the file decodes to."""
    addends = [(1.0, trained), (-1.0, received)]
    if residual is not None and residual.rank:
        addends.append((1.0, residual))
    return combine(addends, min(rank_cap, *trained.shape)).factors
