"""How updates become the next global adapter, one module at a time. Each rule is a list of addends.

`w_k` are the engine's weights, which sum to 1, and η is the server's learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdk.core.flexlora import Combined, combine, live_rank
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Rule

Addends = list[tuple[float, LoraFactors]]


def flexlora(
    current: LoraFactors | None, updates: Sequence[tuple[float, LoraFactors]], eta: float
) -> Addends:
    """As published: G ← Σ w_k B̃_k A_k (Bai et al. 2024, arXiv:2402.11505, section 3.2).

    Devices train their truncation of the global adapter itself, and their states are averaged. With η < 1
    the old global adapter keeps the share 1 − η, which the paper has not.
    """
    kept: Addends = [(1.0 - eta, current)] if current is not None and eta != 1.0 else []
    return [*kept, *((eta * weight, factors) for weight, factors in updates)]


def carry(
    current: LoraFactors | None,
    updates: Sequence[tuple[float, LoraFactors]],
    eta: float,
    relearnt: Sequence[LoraFactors] = (),
) -> Addends:
    """G ← G + η Σ w_k B̃_k A_k, where the factors are fresh ones trained on top of a frozen G.

    What a device trained is what it changed; nothing is subtracted where it carried all of G. `relearnt`:
    for each version that others started from, what they learnt a second time.
    """
    kept: Addends = [(1.0, current)] if current is not None else []
    changes = [(eta * weight, factors) for weight, factors in updates]
    return [*kept, *changes, *((-eta, factors) for factors in relearnt)]


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


def merge_module(
    rule: Rule,
    current: LoraFactors | None,
    updates: Sequence[tuple[float, LoraFactors]],
    eta: float,
    rank_cap: int,
    relearnt: Sequence[LoraFactors] = (),
) -> Combined:
    """The next global factors of one module: canonical, of rank min(rank_cap, out, in) at most.

    `current` is None for version 0, whose update is zero; `relearnt` is for the rule `carry` alone.
    """
    if rule == "flexlora":
        addends = flexlora(current, updates, eta)
    else:
        addends = carry(current, updates, eta, relearnt)
    return combine(addends, min(rank_cap, *addends[0][1].shape))
