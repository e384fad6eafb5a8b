"""Stacking: devices start afresh on top of all that was learnt, and nothing is ever truncated."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rules.carry import Carry
from coordinator.rules.rule import Ranks


class Flora(Carry):
    """G ← [G, w_1 B̃_1 … w_K B̃_K] [G; A_1; …; A_K] (FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976).

    In the paper devices add the stack to their base model and start new factors. A 4-bit base cannot be
    added to without rounding, so that here they hold the stack frozen beside it: the same function. The
    stack is kept in canonical form, the same product, and stops growing where it fills the module. That is
    its price: after some versions every device downloads and holds a factorised full-size update.
    """

    adds_changes = (
        False  # it does; but noise has every direction, and a stack of that fills the module at once
    )

    def objection(self, ladder: Sequence[int], mixed: bool, rank_cap: int, widest: int) -> str:
        """The cap must be as wide as the modules."""
        if rank_cap >= widest:
            return ""
        return (
            f"rule flora never truncates; set federation.rank_cap to {widest}, the most that a module of "
            "this base can hold, or choose carry"
        )

    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """All of the stack; the cap is for rules that truncate."""
        return min(self.stacked_rank(ranks, eta), *shape)
