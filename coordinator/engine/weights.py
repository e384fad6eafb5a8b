"""How much each update counts in the next version: by its examples, and less the older its start is.

Staleness τ is the number of versions published between the one an update started from and the one it is
merged into. The three discounts are those of Xie et al. 2019 (FedAsync, arXiv:1903.03934, section 5.2);
FedBuff (Nguyen et al. 2022, arXiv:2106.06639) uses the polynomial one with a = 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from coordinator.engine.events import Buffered

Discount = Literal["constant", "polynomial", "hinge"]
"""The name of a function s(τ) in (0, 1] that never rises."""

Weighted = tuple[Buffered, float, int]
"""An update, its weight, and its staleness τ."""


def constant(staleness: int) -> float:
    """1 for every update."""
    return 1.0


def polynomial(staleness: int, a: float = 0.5) -> float:
    """(1 + τ)^-a."""
    return float((1.0 + staleness) ** -a)


def hinge(staleness: int, a: float = 10.0, b: int = 4) -> float:
    """1 up to τ = b, then 1 / (a·(τ − b) + 1).

    The paper writes 1 / (a·(τ − b)), which exceeds 1 just past b when a < 1; the + 1 keeps it monotone.
    """
    return 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


DISCOUNTS: dict[Discount, Callable[[int], float]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}


def by_examples(
    updates: Sequence[Buffered], version: int, discount: Discount, max_examples: int
) -> tuple[Weighted, ...]:
    """ŵ_k ∝ min(n_k, cap)·s(τ_k), normalised so that they sum to 1.

    Args:
        updates: those of the next version; n_k is what a device says of itself.
        version: the current one, which τ_k counts from.
        discount: the name of s.
        max_examples: the cap on n_k.
    """
    taus = [version - update.version for update in updates]
    raw = [min(u.examples, max_examples) * DISCOUNTS[discount](t) for u, t in zip(updates, taus, strict=True)]
    total = sum(raw)
    return tuple((u, w / total, tau) for u, w, tau in zip(updates, raw, taus, strict=True))


def by_share(
    updates: Sequence[Buffered], version: int, discount: Discount, buffer_size: int
) -> tuple[Weighted, ...]:
    """s(τ_k)/K with K the buffer's size, whatever devices say and however many they are.

    What one update adds is so bounded beforehand, which differential privacy needs.
    """
    taus = [version - update.version for update in updates]
    return tuple((u, DISCOUNTS[discount](t) / buffer_size, t) for u, t in zip(updates, taus, strict=True))
