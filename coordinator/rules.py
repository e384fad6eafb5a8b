"""How updates become the next global adapter, one module at a time. Each rule is a list of addends.

`w_k` are the engine's weights, which sum to 1, and η is the server's learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_sdk.core.flexlora import Combined, combine
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


def carry(current: LoraFactors | None, updates: Sequence[tuple[float, LoraFactors]], eta: float) -> Addends:
    """G ← G + η Σ w_k B̃_k A_k, where the factors are fresh ones trained on top of a frozen G.

    A device carries all of G, so what it trained is what it changed, and there is nothing to subtract.
    """
    kept: Addends = [(1.0, current)] if current is not None else []
    return [*kept, *((eta * weight, factors) for weight, factors in updates)]


RULES: dict[Rule, Callable[[LoraFactors | None, Sequence[tuple[float, LoraFactors]], float], Addends]] = {
    "flexlora": flexlora,
    "carry": carry,
}


def merge_module(
    rule: Rule,
    current: LoraFactors | None,
    updates: Sequence[tuple[float, LoraFactors]],
    eta: float,
    rank_cap: int,
) -> Combined:
    """The next global factors of one module: canonical, of rank min(rank_cap, out, in) at most.

    `current` is None for version 0, whose update is zero.
    """
    addends = RULES[rule](current, updates, eta)
    return combine(addends, min(rank_cap, *addends[0][1].shape))
