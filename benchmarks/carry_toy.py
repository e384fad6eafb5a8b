"""A federation whose right answer is known: matrix regression with Adam, vectorised over devices.

80 devices regress on a 64 × 64 target of rank 16, each on its own noisy copy, as in the design's comparison of
the rules. 120 versions merge 10 updates each, of staleness 0, 1 or 2. What is measured is the relative error
‖G − W‖ / ‖W‖ of the global matrix; the mean of all noisy copies has an error of 0.03.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from coordinator.rules import merge_module, relearnt
from edge_sdk.core.carried import CarriedDtype
from edge_sdk.core.flexlora import fresh_row, live_rank, serve
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.messages import Rule
from edge_sdk.frozen_factors import FrozenFactor

WIDTH, TRUE_RANK, RANK_CAP = 64, 16, 32
DEVICES, VERSIONS, BUFFER_SIZE, MOST_STALE = 80, 120, 10, 2
DECAY = 0.8  # from one singular value of the target to the next
NOISE = 0.3  # of each device's copy, relative to the norm of the target
STEPS, LEARNING_RATE = 20, 0.02

Fresh = Literal["random", "top", "warm"]


@dataclass(frozen=True)
class Split:
    """What a device trains and what it carries."""

    rank: int
    carry_rank: int = 0
    dtype: CarriedDtype = "float32"


@dataclass(frozen=True)
class Rules:
    """How the federation merges, and how factors to train begin under `carry`. See `carry_training`."""

    rule: Rule = "carry"
    corrected: bool = True
    fresh: Fresh = "random"


def target(seed: int) -> tuple[Matrix, Matrix]:
    """The target (64, 64) with singular values 1, 0.8, 0.64, …, and every device's noisy copy (80, 64, 64)."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((WIDTH, TRUE_RANK)))
    v, _ = np.linalg.qr(rng.standard_normal((WIDTH, TRUE_RANK)))
    wanted = (u * DECAY ** np.arange(TRUE_RANK)) @ v.T
    noise = rng.standard_normal((DEVICES, WIDTH, WIDTH)) / WIDTH
    return wanted, wanted + NOISE * np.linalg.norm(wanted) * noise


def federate(splits: Sequence[Split], rules: Rules, seed: int, versions: int = VERSIONS) -> float:
    """Relative error after `versions`, where device i does what `splits[i]` says."""
    wanted, copies = target(seed)
    history = [LoraFactors.empty(WIDTH, WIDTH)]
    for version in range(versions):
        drawn = np.random.default_rng([seed, version])
        devices = drawn.permutation(DEVICES)[:BUFFER_SIZE]
        begun = np.maximum(0, version - drawn.integers(0, MOST_STALE + 1, BUFFER_SIZE))
        changes: dict[int, LoraFactors] = {}
        for start, split in sorted({(int(b), splits[d]) for b, d in zip(begun, devices, strict=True)}, key=str):
            group = [d for b, d in zip(begun, devices, strict=True) if b == start and splits[d] == split]
            for d, factors in zip(group, _trained(history[start], split, rules, copies[group], (seed, version, start)), strict=True):
                changes[int(d)] = factors
        weights = (1.0 + version - begun) ** -0.5
        weights /= weights.sum()
        updates = [(float(w), changes[int(d)]) for w, d in zip(weights, devices, strict=True)]
        again = []
        if rules.rule == "carry" and rules.corrected:
            for start in sorted(set(begun.tolist())):
                members = [
                    (w, splits[d].carry_rank, factors)
                    for (w, factors), b, d in zip(updates, begun, devices, strict=True)
                    if b == start
                ]
                if history[start].rank:
                    again.append(relearnt(history[start], members))
        current = history[-1] if history[-1].rank else None
        history.append(merge_module(rules.rule, current, updates, 1.0, RANK_CAP, again).factors)
        if not np.isfinite(history[-1].b).all() or history[-1].norm() > 1e3:
            return float("inf")
    return float(np.linalg.norm(history[-1].product() - wanted) / np.linalg.norm(wanted))


def _trained(
    start: LoraFactors, split: Split, rules: Rules, copies: Matrix, at: tuple[int, int, int]
) -> list[LoraFactors]:
    """What devices that share a start and a split send: their changes, or their states under `flexlora`."""
    seeds = [f"{at}/{i}" for i in range(len(copies))]
    if rules.rule == "flexlora":
        begin = serve(start, split.rank, "balanced", seeds[0])
        b, a = _adam(np.stack([begin.b] * len(copies)), np.stack([begin.a] * len(copies)), copies)
        return [LoraFactors(*both) for both in zip(b, a, strict=True)]
    held = start.leading(min(split.carry_rank, live_rank(start)))
    warm = min(split.rank, held.rank) if rules.fresh == "warm" else 0
    frozen = _held(LoraFactors(held.b[:, warm:], held.a[warm:]), split.dtype)
    first = held.leading(warm)
    b0, a0 = [], []
    for seed in seeds:
        begin = first if warm else LoraFactors.empty(WIDTH, WIDTH)
        if rules.fresh == "top":
            rows = start.leading(min(split.rank, live_rank(start))).a
            begin = LoraFactors(np.zeros((WIDTH, len(rows)), np.float32), rows)
        begin = _filled(begin, split.rank, seed, "balanced" if warm else None)
        b0.append(begin.b)
        a0.append(begin.a)
    b, a = _adam(np.stack(b0), np.stack(a0), copies - frozen)
    if not warm:
        return [LoraFactors(*both) for both in zip(b, a, strict=True)]
    return [
        LoraFactors(np.concatenate([bk, -first.b], axis=1), np.concatenate([ak, first.a]))
        for bk, ak in zip(b, a, strict=True)
    ]


def _filled(begin: LoraFactors, rank: int, seed: str, how: str | None) -> LoraFactors:
    if how == "balanced" and begin.rank:
        return serve(begin, rank, "balanced", seed)
    rows = [fresh_row(WIDTH, f"{seed}/{i}") for i in range(rank - begin.rank)]
    if not rows:
        return begin
    return LoraFactors(
        np.concatenate([begin.b, np.zeros((WIDTH, len(rows)), np.float32)], axis=1), np.concatenate([begin.a, rows])
    )


def _held(carried: LoraFactors, dtype: CarriedDtype) -> Matrix:
    """The dense matrix that a device computes with that holds `carried` in `dtype`."""
    if not carried.rank:
        return np.zeros((WIDTH, WIDTH))
    b = FrozenFactor(torch.from_numpy(np.ascontiguousarray(carried.b)), dtype, torch.float32, components=1)
    a = FrozenFactor(torch.from_numpy(np.ascontiguousarray(carried.a)), dtype, torch.float32, components=0)
    return (b.dense(torch.float32) @ a.dense(torch.float32)).numpy().astype(np.float64)


def _adam(b: Matrix, a: Matrix, wanted: Matrix) -> tuple[Matrix, Matrix]:
    """STEPS steps of Adam on ½‖BA − W_k‖², every device (first axis) by itself, as `trainer` does them."""
    values = [b.astype(np.float64), a.astype(np.float64)]
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    warm_up = max(1, round(0.1 * STEPS))
    for step in range(1, STEPS + 1):
        left, right = values
        residual = left @ right - wanted
        gradients = (residual @ right.transpose(0, 2, 1), left.transpose(0, 2, 1) @ residual)
        rate = LEARNING_RATE * min(1.0, step / warm_up)
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            direction = (first[i] / (1 - 0.9**step)) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            values[i] = values[i] - rate * direction
    return values[0].astype(np.float32), values[1].astype(np.float32)
