"""Devices hold the global adapter frozen and train fresh factors on top: nobody's start is truncated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.rules.rule import Addends, Merging, Ranks, SumRule
from edge_sdk.core.flexlora import live_rank
from edge_sdk.core.lora import LoraFactors


class Carry(SumRule):
    """G ← G + η Σ w_k B̃_k A_k, where the factors are fresh ones.

    What a device trained is what it changed; nothing is subtracted where it carried all of G. Where it did
    not, what it learnt a second time is taken out; see `relearnt`.

    In FRLoRA (ICLR 2025) and FedMomentum (arXiv:2603.08014), too, fresh factors are trained on top of a
    global update that is held or merged. Not found there: the frozen part beside a 4-bit base in int8 or NF4,
    less than all of it carried, and updates of unequal versions. Fed-PLoRA (arXiv:2602.16936) folds what a
    device does not train into the frozen part; the server of FLoRIST (arXiv:2506.09199), too, takes the SVD
    of a small core.
    """

    carries = True
    adds_changes = True

    def needs_start(self, rank: int, carry_rank: int, live: int) -> bool:
        """Only where there was something that the device did not see."""
        return carry_rank < live

    def addends(self, merging: Merging) -> Addends:
        """G, the changes, and what devices of each version learnt again."""
        kept: Addends = [(1.0, merging.current)] if merging.current.rank else []
        changes = [(merging.eta * change.weight, change.factors) for change in merging.changes]
        again: Addends = []
        for version, start in sorted(merging.starts.items()):
            parts = [(c.weight, c.carry_rank, c.factors) for c in merging.changes if c.version == version]
            again.append((-merging.eta, relearnt(start, parts)))
        return [*kept, *changes, *again]

    def stacked_rank(self, ranks: Ranks, eta: float) -> int:
        """G, all updates, and each version that some did not see all of."""
        return sum(ranks.updates) + ranks.current + sum(ranks.starts.values())


def relearnt(start: LoraFactors, updates: Sequence[tuple[float, int, LoraFactors]]) -> LoraFactors:
    """What changes hold of the components that their devices did not carry: Σ w_k U_t U_tᵀ D_k V_t V_tᵀ.

    A device that carries c components does not see the tail, components c, c+1, … of the version that it
    started from; it learns them again, and the sum would count them twice. D_k = B̃_k A_k is not formed:

        U_t U_tᵀ D_k V_t V_tᵀ = U (M_k (Uᵀ B̃_k) (A_k V) M_k) Vᵀ,   M_k = diag(i ≥ c_k)

    with all components U, V of the version, so that devices of one version differ in the mask alone and
    their (R, R) cores add up: one addend for each version, however many devices.

    Args:
        start: canonical factors of that version, `b = U·S` and `a = Vᵀ`, rank R.
        updates: (w_k, c_k, factors) of devices that started from it.

    Returns:
        Factors of rank R; the zero update where every c_k is at least the live rank.
    """
    sigmas = np.linalg.norm(start.b.astype(np.float64), axis=0)
    live = np.arange(start.rank) < live_rank(start)
    u = np.where(live, start.b / np.where(live, sigmas, 1.0), 0.0)
    core = np.zeros((start.rank, start.rank))
    for weight, carried, factors in updates:
        unseen = np.arange(start.rank) >= carried
        left = (u.T @ factors.b) * unseen[:, None]
        core += weight * left @ ((factors.a @ start.a.T.astype(np.float64)) * (live & unseen))
    return LoraFactors(u @ core, start.a)
