"""What privacy the published versions have cost, by Google's `dp-accounting`. The one place that names it.

A version adds N(0, (zC/K)²) to a sum in which one device has a part of norm C/K at most: a Gaussian
mechanism of noise multiplier z. Mechanisms z_1, z_2, … that one device's updates entered cost together what a
single one of multiplier `(Σ 1/z_i²)^-½` costs, exactly (Dong, Roth and Su 2022, arXiv:1905.02383), also where
each, and whether there is another, depends on what the earlier ones gave (Smith and Thakurta 2022,
arXiv:2210.17520). Its ε at δ is that of the analytic Gaussian mechanism (Balle and Wang 2018,
arXiv:1805.06530, theorem 8), which the library solves for.

There is no amplification by subsampling in it: who takes part follows from who is there, and not from a
secret draw.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_sdk.core.errors import InputError

Spent = Mapping[float, int]
"""Noise multiplier to the number of versions with it that the updates of one device entered."""

MOST_ENTRIES = 1 << 30  # where the budget is larger than anybody will use


@functools.cache
def library() -> Any:
    """The package `dp_accounting`; imported when privacy is asked for, because it takes two seconds.

    Raises:
        InputError: it is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise InputError(
            f"[privacy] needs the package dp-accounting ({error}); pip install 'flexlora-edge[privacy]'"
        ) from error
    return dp_accounting


def precision(spent: Spent) -> float:
    """Σ n/z²: the inverse square of the one multiplier that costs as much. More of it is worse."""
    return math.fsum(count / z**2 for z, count in spent.items())


def epsilon(spent: Spent, delta: float) -> float:
    """ε at `delta` of one device; 0 for a device whose updates entered nothing."""
    cost = precision(spent)
    return _epsilon(cost, delta) if cost else 0.0


@functools.lru_cache(maxsize=1024)
def _epsilon(cost: float, delta: float) -> float:
    with np.errstate(divide="ignore"):  # with very much noise it takes log 0 on the way, and means −∞
        return float(library().get_epsilon_gaussian(1.0 / math.sqrt(cost), delta))


def entries_left(spent: Spent, noise_multiplier: float, delta: float, max_epsilon: float) -> int:
    """How many more versions a device may enter at `noise_multiplier` before its ε exceeds `max_epsilon`."""

    def fits(more: int) -> bool:
        together = {**spent, noise_multiplier: spent.get(noise_multiplier, 0) + more}
        return epsilon(together, delta) <= max_epsilon

    if not fits(1):
        return 0
    fitting, too_many = 1, 2
    while too_many <= MOST_ENTRIES and fits(too_many):
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting
