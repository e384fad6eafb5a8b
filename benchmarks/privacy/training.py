"""A federation under differential privacy: twelve households, updates clipped, the sum noised.

The noise comes from a seed here, so that a run can be repeated; the coordinator's never does.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.common.federation import (
    RANK_CAP,
    Base,
    Homes,
    Turn,
    drawn,
    fresh_factors,
    grown,
    half_stale,
    live_parts,
    plan_of,
)
from coordinator.engine.weights import polynomial
from coordinator.privacy.mechanism import Privacy, clip_factor, noised, squared_norm_bound
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Training
from edge_sdk.training.plan import Start

RANK, WIDE = 4, 4.0  # WIDE: rows of a fresh A under `carry`, as the device draws them
HOUSEHOLDS, BUFFER_SIZE, TEST_PER_INTENT = 12, 8, 3
TRAINING = Training(steps=6, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.94)
SETTINGS = {"training": asdict(TRAINING), "rank": RANK, "households": HOUSEHOLDS, "buffer_size": BUFFER_SIZE}


@dataclass(frozen=True)
class Outcome:
    """Held-out loss at half and at the end, norms of changes, versions that the busiest device entered."""

    losses: list[float]
    median_norm: float
    clipped_share: float
    most_entered: int


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        self._base = Base()

    def run(self, clip_norm: float, z: float, seed: int, last: int) -> Outcome:
        """Train until version `last`; clip to `clip_norm` (∞: not) and add noise of multiplier `z`."""
        homes = Homes(self._base, HOUSEHOLDS, TEST_PER_INTENT, seed, TRAINING.sequence_len)
        history: list[Adapter] = [self._base.empty()]
        norms, entered = list[float](), Counter[int]()
        std = Privacy(z, clip_norm).noise_std(BUFFER_SIZE) if z else 0.0

        def train(turn: Turn) -> tuple[float, Adapter]:
            own_seed = seed * 10_000 + turn.version * 100 + turn.device
            fresh = fresh_factors(self._base.shapes, RANK, WIDE, own_seed)
            start = Start(fresh, live_parts(history[turn.begin]), RANK, own_seed)
            done = self._base.train(start, homes.train[turn.device], plan_of(TRAINING, turn.begin))
            squared = sum(squared_norm_bound(factors) for factors in done.adapter.values())
            norms.append(math.sqrt(squared))
            entered[turn.device] += 1
            factor = clip_factor(squared, clip_norm) if clip_norm < math.inf else 1.0
            return factor * polynomial(turn.version - turn.begin) / BUFFER_SIZE, done.adapter

        def merge(changes: list[tuple[float, Adapter]]) -> Adapter:
            draw = np.random.default_rng([seed, len(history) - 1, 1])
            return _merged(history[-1], changes, std, draw)

        def taking_part(version: int) -> list[Turn]:
            return half_stale(drawn(HOUSEHOLDS, BUFFER_SIZE, seed, version), version)

        losses = [
            self._base.loss(adapter, homes.test)
            for number, adapter in grown(history, last, taking_part, train, merge)
            if number in (last // 2, last)
        ]
        clipped = statistics.mean(norm > clip_norm for norm in norms)
        return Outcome(losses, statistics.median(norms), clipped, max(entered.values()))


def _merged(
    current: Adapter, changes: list[tuple[float, Adapter]], std: float, draw: np.random.Generator
) -> Adapter:
    """The next version, by the coordinator's own noised merge."""
    merged = {}
    for name, factors in current.items():
        addends = [(1.0, factors), *((weight, change[name]) for weight, change in changes)]
        merged[name] = noised(addends, std, min(RANK_CAP, *factors.shape), draw.standard_normal).factors
    return merged
