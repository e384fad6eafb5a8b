"""Mergings of one small module, drawn at random, and what they come to in dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix
from tests.edge_sdk.core.draws import factors

OUT, IN = 9, 7
CAP = 7  # holds every rank, so that nothing is truncated
NOTHING = LoraFactors.empty(OUT, IN)


def drawn(seed: int, ranks: Sequence[int]) -> list[Change]:
    """Updates of these ranks from version 0, with weights that sum to 1 as the engine's do."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1.0, len(ranks))
    return [
        Change(float(w), factors(rng, OUT, IN, r))
        for w, r in zip(weights / weights.sum(), ranks, strict=True)
    ]


def from_versions(changes: Sequence[Change], versions: Sequence[int]) -> list[Change]:
    """The same updates, trained from these versions."""
    return [replace(change, version=v) for change, v in zip(changes, versions, strict=True)]


def canonical(seed: int, rank: int) -> LoraFactors:
    """A global adapter as it is stored, of this live rank."""
    return combine([(1.0, factors(np.random.default_rng(seed), OUT, IN, rank))], rank).factors


def merged(rule: str, merging: Merging, cap: int = CAP) -> Matrix:
    """The next global update, dense."""
    return rule_named(rule).next(merging, cap).factors.product()


def total(changes: Sequence[Change]) -> Matrix:
    """Σ w_k B̃_k A_k, in float64."""
    found: Matrix = np.sum([c.weight * product(c.factors) for c in changes], axis=0)
    return found


def product(f: LoraFactors) -> Matrix:
    """The dense product in float64."""
    return f.b.astype(np.float64) @ f.a.astype(np.float64)


def truncated(version: LoraFactors, rank: int) -> Matrix:
    """T_r(G): the best approximation of rank r, from a dense SVD."""
    u, s, vt = np.linalg.svd(product(version), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def starts_of(versions: Mapping[int, LoraFactors], changes: Sequence[Change]) -> dict[int, LoraFactors]:
    """The versions that these updates were trained from, but for version 0."""
    return {v: versions[v] for v in {change.version for change in changes} if v}


def close(actual: Matrix, expected: Matrix, scale: float | None = None) -> None:
    """Equal to 1e-5 of `scale`, by default the largest singular value."""
    size = float(np.linalg.norm(expected, 2)) if scale is None else scale
    assert np.abs(actual - expected).max() <= 1e-5 * max(1e-9, size)
