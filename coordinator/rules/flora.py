"""Stacking: devices start afresh on top of all that was learnt, and nothing is ever truncated."""

from __future__ import annotations

from coordinator.rules.carry import Carry
from coordinator.rules.rule import Ranks


class Flora(Carry):
    """G ← [G, w_1 B̃_1 … w_K B̃_K] [G; A_1; …; A_K] (FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976).

    In the paper devices add the stack to their base model and start new factors. A 4-bit base cannot be
    added to without rounding, so that here they hold the stack frozen beside it: the same function. The
    stack is kept in canonical form, the same product, and stops growing where it fills the module. That is
    its price: after some versions every device downloads and holds a factorised full-size update.
    """

    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """All of the stack; the cap is for rules that truncate."""
        return min(self.stacked_rank(ranks, eta), *shape)
