"""Averaging factors of unequal ranks: filled up with zeros, weighted by how much each device learnt."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.rules.fedit import FedIt
from coordinator.rules.rule import Change


class HetLora(FedIt):
    """B ← Σ p_k [B̃_k 0],  A ← Σ p_k [A_k; 0],  p_k ∝ w_k ‖B̃_k A_k‖_F (Cho et al., EMNLP 2024,
    arXiv:2401.06432, section 3.2: zero-padding, sparsity-weighted aggregation, truncation).

    A device of rank r is given the first r components. Components that few devices hold are diluted by the
    zeros of the others; the norm, which is larger for devices of higher rank, works against that. The norm is
    taken module by module. The paper's rank self-pruning, a penalty in local training, is not included:
    here a device's rank follows from its memory.
    """

    def objection(self, ladder: Sequence[int], mixed: bool, rank_cap: int, widest: int) -> str:
        """Ranks may be unequal."""
        return ""

    def weights(self, changes: Sequence[Change]) -> list[float]:
        """By the norm of the product; the engine's where all products are zero."""
        norms = [change.weight * change.factors.norm() for change in changes]
        total = sum(norms)
        return [norm / total for norm in norms] if total > 0 else super().weights(changes)
