"""How much each update counts in the next version."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.engine import staleness
from coordinator.engine.events import Buffered
from coordinator.engine.policy import Policy

Weighted = tuple[Buffered, float, int]
"""An update, its weight, and its staleness τ."""


def by_examples(updates: Sequence[Buffered], version: int, policy: Policy) -> tuple[Weighted, ...]:
    """ŵ_k ∝ n_k·s(τ_k), with n_k capped, summing to 1; `version` is the current one."""
    discount = staleness.FUNCTIONS[policy.staleness]
    taus = [version - update.version for update in updates]
    raw = [min(u.examples, policy.max_examples) * discount(tau) for u, tau in zip(updates, taus, strict=True)]
    total = sum(raw)
    return tuple((u, w / total, tau) for u, w, tau in zip(updates, raw, taus, strict=True))


def by_share(updates: Sequence[Buffered], version: int, policy: Policy) -> tuple[Weighted, ...]:
    """s(τ_k)/K, whatever devices say and however many they are: what one adds is bounded beforehand."""
    discount = staleness.FUNCTIONS[policy.staleness]
    taus = [version - update.version for update in updates]
    return tuple((u, discount(tau) / policy.buffer_size, tau) for u, tau in zip(updates, taus, strict=True))
