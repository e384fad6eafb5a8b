"""How much an update trained from an old version counts.

Staleness τ is the number of versions published between the one an update started from and the one it is
merged into. The three functions are those of Xie et al. 2019 (FedAsync, arXiv:1903.03934, section 5.2);
FedBuff (Nguyen et al. 2022, arXiv:2106.06639) uses the polynomial one with a = 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Name = Literal["constant", "polynomial", "hinge"]


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


FUNCTIONS: dict[Name, Callable[[int], float]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}
