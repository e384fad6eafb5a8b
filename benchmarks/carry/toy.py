"""A federation whose right answer is known (benchmarks/common/regression.py), all devices at once.

80 devices regress on a 64 × 64 target of rank 16. 120 versions merge 10 updates each, of staleness 0, 1 or 2.
The mean of all noisy copies has an error of 0.03.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.common.regression import Adam, Problem
from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.flexlora import fresh_row, live_rank, serve
from edge_sdk.core.lora import LoraFactors, Matrix, stacked
from edge_sdk.training.factor_layers import FrozenFactor

WIDTH, TRUE_RANK, RANK_CAP = 64, 16, 32
DEVICES, VERSIONS, BUFFER_SIZE, MOST_STALE = 80, 120, 10, 2
ADAM = Adam(steps=20, learning_rate=0.02, warm_up=2)
SETTINGS = {"adam": asdict(ADAM), "devices": DEVICES, "buffer_size": BUFFER_SIZE, "rank_cap": RANK_CAP}
DIVERGED = 1e3  # norm of a global matrix that is lost; the target's is 1.7

Fresh = Literal["random", "top", "warm", "some"]


@dataclass(frozen=True)
class Split:
    """What a device trains and what it carries."""

    rank: int
    carry_rank: int = 0
    dtype: CarriedDtype = "float32"


@dataclass(frozen=True)
class Rules:
    """How the federation merges, and how factors to train begin under `carry`. See `carry_training`."""

    rule: str = "carry"
    corrected: bool = True
    fresh: Fresh = "random"
    wide: float = 1.0  # factor on the rows of a random A


def federate(
    splits: Sequence[Split], rules: Rules, seed: int, versions: int = VERSIONS, most_stale: int = MOST_STALE
) -> float:
    """Relative error after `versions`, where device i does what `splits[i]` says; infinite if it diverged.

    Updates have a staleness of 0 to `most_stale`; with 0 the federation is synchronous.
    """
    problem = Problem.drawn(WIDTH, TRUE_RANK, DEVICES, np.random.default_rng(seed))
    history = [LoraFactors.empty(WIDTH, WIDTH)]
    for version in range(versions):
        drawn = np.random.default_rng([seed, version])
        devices = [int(d) for d in drawn.permutation(DEVICES)[:BUFFER_SIZE]]
        stale = drawn.integers(0, most_stale + 1, BUFFER_SIZE)
        begun = dict(zip(devices, np.maximum(0, version - stale).tolist(), strict=True))
        changes: dict[int, LoraFactors] = {}
        for start, split in sorted({(begun[d], splits[d]) for d in devices}, key=str):
            group = [d for d in devices if (begun[d], splits[d]) == (start, split)]
            at = (seed, version, start)
            sent = _trained(history[start], split, rules, problem.copies[group], at)
            changes |= zip(group, sent, strict=True)
        raw = {d: (1.0 + version - begun[d]) ** -0.5 for d in devices}
        weights = {d: w / sum(raw.values()) for d, w in raw.items()}
        starts = {v: history[v] for v in set(begun.values()) if history[v].rank} if rules.corrected else {}
        updates = [Change(weights[d], changes[d], begun[d], splits[d].carry_rank) for d in devices]
        merging = Merging(history[-1], updates, version, starts)
        history.append(rule_named(rules.rule).next(merging, RANK_CAP).factors)
        if history[-1].norm() > DIVERGED:
            return float("inf")
    return problem.error(history[-1])


def _trained(
    start: LoraFactors, split: Split, rules: Rules, copies: Matrix, at: tuple[int, int, int]
) -> list[LoraFactors]:
    """What devices that share a start and a split send: their changes, or states where nothing is carried."""
    held = start.leading(min(split.carry_rank, live_rank(start)))
    begun, targets, subtracted = [], [], []
    rule = rule_named(rules.rule)
    for place, copy in enumerate(copies):
        seed = f"{at}/{place}"
        if rule.carries:
            frozen, first = _parted(held, min(split.rank, held.rank), rules, (*at, place))
            own = serve(first, first.rank, "balanced", seed) if first.rank else first
            begun.append(_filled(own, start, split.rank, rules, seed))
        else:  # one served file for all
            frozen, first = LoraFactors.empty(WIDTH, WIDTH), LoraFactors.empty(WIDTH, WIDTH)
            begun.append(rule.serve(start, split.rank, "balanced", f"{at}"))
        targets.append(copy - _held(frozen, split.dtype))
        subtracted.append(first)
    b, a = ADAM.fit(np.stack([f.b for f in begun]), np.stack([f.a for f in begun]), np.stack(targets))
    states = [LoraFactors(*both) for both in zip(b, a, strict=True)]
    if not rule.carries:
        return states
    return [stacked([(1.0, f), (-1.0, s)]) for f, s in zip(states, subtracted, strict=True)]


def _parted(
    held: LoraFactors, trained: int, rules: Rules, seed: tuple[int, ...]
) -> tuple[LoraFactors, LoraFactors]:
    """Of what a device holds: the components that stay frozen, and those that it trains themselves."""
    if rules.fresh not in ("warm", "some"):
        return held, LoraFactors.empty(WIDTH, WIDTH)
    order = np.arange(held.rank)
    if rules.fresh == "some":
        order = np.random.default_rng(seed).permutation(held.rank)
    first, rest = np.sort(order[:trained]), np.sort(order[trained:])
    return LoraFactors(held.b[:, rest], held.a[rest]), LoraFactors(held.b[:, first], held.a[first])


def _filled(begin: LoraFactors, start: LoraFactors, rank: int, rules: Rules, seed: str) -> LoraFactors:
    """Fresh components (B = 0) up to `rank`: A from the version's first rows, or random."""
    rows = [rules.wide * fresh_row(WIDTH, f"{seed}/{i}") for i in range(rank - begin.rank)]
    if rules.fresh == "top":
        rows[: live_rank(start)] = start.a[: min(rank, live_rank(start))]
    if not rows:
        return begin
    b = np.concatenate([begin.b, np.zeros((WIDTH, len(rows)), np.float32)], axis=1)
    return LoraFactors(b, np.concatenate([begin.a, np.stack(rows)]).astype(np.float32))


def _held(carried: LoraFactors, dtype: CarriedDtype) -> Matrix:
    """The dense matrix that a device computes with that holds `carried` in `dtype`."""
    if not carried.rank:
        return np.zeros((WIDTH, WIDTH))
    b = FrozenFactor(torch.from_numpy(np.ascontiguousarray(carried.b)), dtype, torch.float32, components=1)
    a = FrozenFactor(torch.from_numpy(np.ascontiguousarray(carried.a)), dtype, torch.float32, components=0)
    return (b.dense(torch.float32) @ a.dense(torch.float32)).numpy().astype(np.float64)
