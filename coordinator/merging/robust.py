"""Merging in spite of a minority that sends harmful updates: new weights from the changes' inner products.

Every rule here is a function of the K × K Gram matrix ⟨D_i, D_j⟩ of a buffer's changes and of their weights,
and gives weights and factors back. It never sees a matrix of the model, so it serves every merge rule that
sums products, and nothing dense is formed:

    ⟨D_i, D_j⟩ = tr(D_iᵀ D_j) = tr((B_iᵀ B_j)(A_j A_iᵀ)),   summed over the modules.

Distances between *products* are what counts: the same update has many pairs of factors. D_k is what a device
changed, also where the rule merges states (`flexlora`): states share their start, which would hide what was
done to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.core.lora import LoraFactors, stacked

Vector = npt.NDArray[np.floating[Any]]
RobustName = Literal["none", "norm_median", "geometric_median", "trimmed"]

# As shares of the median norm. ν of Weiszfeld's steps: nothing is divided by a distance of zero. A step that
# moves the median by less is the last one.
SMOOTHING, SETTLED = 1e-6, 1e-5
MOST_STEPS = 1000


@dataclass(frozen=True)
class Reweighted:
    """What to merge instead of Σ w_k D_k: Σ weights_k · factors_k · D_k. Both (K,).

    `weights` sum to 1. `factors` lie in [0, 1]: a change that is too long counts for less, and nobody else
    for more.
    """

    weights: Vector
    factors: Vector


def gram(blocks: Sequence[LoraFactors]) -> Vector:
    """⟨D_i, D_j⟩ of updates of one module, (K, K) in float64, through the (R, R) product of the two stacks.

    Args:
        blocks: K factors of one (out, in), of any ranks, 0 included; R is their sum.
    """
    whole = stacked([(1.0, f) for f in blocks])
    b, a = whole.b.astype(np.float64), whole.a.astype(np.float64)
    owner = np.repeat(np.arange(len(blocks)), [f.rank for f in blocks])
    picks = (owner == np.arange(len(blocks))[:, None]).astype(np.float64)  # (K, R): whose component it is
    return np.asarray(picks @ ((b.T @ b) * (a @ a.T)) @ picks.T)


def norms(inner: Vector) -> Vector:
    """‖D_k‖ of each change, (K,), from their Gram matrix."""
    return np.sqrt(np.maximum(0.0, np.diag(inner)))


def lower_median(values: Sequence[float]) -> float:
    """The median; of an even count the lower of the two in the middle.

    It is one of the values of the smaller half, so that half of the values can be as large as they like.
    """
    return sorted(values)[(len(values) - 1) // 2]


def none(inner: Vector, weights: Vector) -> Reweighted:
    """The weighted mean as it is."""
    return Reweighted(weights, np.ones(len(weights)))


def norm_median(inner: Vector, weights: Vector) -> Reweighted:
    """Clip each change to the median norm of the buffer: Σ w_k min(1, m / ‖D_k‖) D_k.

    Norm clipping (Sun et al. 2019, arXiv:1911.07963, section 4) whose bound needs no setting. It takes the
    length out of an attack, not its direction.
    """
    lengths = norms(inner)
    middle = lower_median(lengths.tolist())
    return Reweighted(weights, np.divide(middle, lengths, out=np.ones(len(weights)), where=lengths > middle))


def geometric_median(inner: Vector, weights: Vector) -> Reweighted:
    """The point v = Σ β_k D_k with the least Σ w_k ‖v − D_k‖, by smoothed Weiszfeld steps.

    RFA (Pillutla, Kakade and Harchaoui, IEEE TSP 2022, arXiv:1912.13445, algorithm 2):
    β_k ∝ w_k / max(ν, ‖v − D_k‖), v = Σ β_k D_k, from v = the weighted mean. The distances follow from the
    Gram matrix alone, ‖v − D_k‖² = βᵀGβ − 2 (Gβ)_k + G_kk. Less than half of the weight cannot carry it away.
    """
    lengths, shares = norms(inner), weights / weights.sum()
    scale = float(lower_median(lengths.tolist()) or lengths.max())
    if scale == 0.0:
        return none(inner, shares)  # nobody changed anything
    for _ in range(MOST_STEPS):
        along = inner @ shares
        distances = np.sqrt(np.maximum(0.0, shares @ along - 2 * along + np.diag(inner)))
        pulls = weights / np.maximum(distances, SMOOTHING * scale)
        step = pulls / pulls.sum() - shares
        shares = shares + step
        if float(step @ inner @ step) <= (SETTLED * scale) ** 2:
            break
    return Reweighted(shares, np.ones(len(weights)))


def trimmed(inner: Vector, weights: Vector, share: float) -> Reweighted:
    """Leave out the longest changes: ⌈share · K⌉ of them, but never all; the others' weights sum to 1 again.

    Norm-based elimination (Gupta, Liu and Vaidya 2020, arXiv:2008.04699). Of equal lengths the earlier in the
    buffer stay. It costs the longest honest updates too, which under `carry` are those of the highest rank.
    """
    count = len(weights)
    dropped = min(count - 1, math.ceil(share * count - 1e-9))
    kept = np.argsort(norms(inner), kind="stable")[: count - dropped]
    left = np.zeros(count)
    left[kept] = weights[kept]
    return Reweighted(left / left.sum(), np.ones(count))


def reweight(name: RobustName, inner: Vector, weights: Vector, trimmed_share: float) -> Reweighted:
    """Apply the rule `name`.

    Args:
        name: one of the rules above.
        inner: Gram matrix of the changes, (K, K), K ≥ 1.
        weights: the engine's, (K,), positive, summing to 1.
        trimmed_share: for `trimmed`.
    """
    rules: Mapping[RobustName, Callable[[Vector, Vector], Reweighted]] = {
        "none": none,
        "norm_median": norm_median,
        "geometric_median": geometric_median,
        "trimmed": lambda inner, weights: trimmed(inner, weights, trimmed_share),
    }
    return rules[name](inner, weights)
