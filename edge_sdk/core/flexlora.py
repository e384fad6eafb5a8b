"""FlexLoRA: the weighted sum of LoRA updates of unequal ranks, and its best approximation of any rank.

Bai et al., NeurIPS 2024, arXiv:2402.11505, section 3: `ΔW = Σ w_k B̃_k A_k`, `ΔW = U S Vᵀ`, and a device
of rank r gets the first r components. The dense ΔW is not formed where the stack of all updates is thinner
than it: `svd.decompose` decomposes the stack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.core.svd.stack import Stack, Wide
from edge_sdk.core.svd.triplets import Triplets

Split = Literal["sigma_in_b", "balanced"]

Decompose = Callable[[Stack, int], Triplets]
"""(stack, rank) -> its leading min(rank, R) singular triplets."""

# A component whose singular value is below this share of the largest is numerical noise of float32 input.
DEAD_BELOW = 1e-6

# Fresh factors begin with rows of A so many times as long as peft draws them (±1/√in, so of norm 0.58).
# Adam's steps on B have one size whatever the gradient, and what they change is that times A: an assignment
# is too short for fresh factors to get as far as trained ones, whose rows have grown. See docs/CARRY.md.
FRESH_ROWS = 4.0


@dataclass(frozen=True)
class Combined:
    """A truncated sum. `factors` is canonical: `b = U·S` (columns by falling σ), `a = Vᵀ` (orthonormal rows).

    `singular_values` are those that the decomposition found: the kept ones, and all where R is below 1500.
    `energy` is ‖ΔW‖²_F of the whole sum and `discarded_energy` what truncation dropped of it, Σ σ_i² over the
    dropped components; both are exact in either case.
    """

    factors: LoraFactors
    singular_values: Wide
    energy: float
    discarded_energy: float


def combine(addends: Sequence[tuple[float, LoraFactors]], rank: int, by: Decompose = decompose) -> Combined:
    """The best rank-`rank` approximation of `Σ w_k b_k a_k`.

    Args:
        addends: (weight, factors) pairs of one module, any mixture of ranks, weights of any sign.
        rank: components to keep, 1 ≤ rank ≤ min(out, in); fewer come back if the stack holds fewer.
        by: what decomposes the stack; another one may do so on an accelerator.

    Returns:
        Canonical float32 factors, the known singular values of the sum (in float64) and its energies.

    Raises:
        AdapterError: no addends, unequal shapes, a value that is not finite, or an impossible rank.
    """
    stack = Stack(addends)
    if not 1 <= rank <= min(stack.shape):
        raise AdapterError(
            f"rank {rank} does not fit a module of shape {stack.shape}; at most {min(stack.shape)}"
        )
    found = by(stack, rank)
    kept = found.u.shape[1]
    u, vt = with_fixed_signs(found.u, found.vt)
    factors = LoraFactors((u * found.s[:kept]).astype(np.float32), vt.astype(np.float32))
    return Combined(factors, found.s, found.energy, found.discarded_energy)


def with_fixed_signs(u: Wide, vt: Wide) -> tuple[Wide, Wide]:
    """Make the largest entry of every left vector positive: an SVD fixes each pair only up to its sign."""
    peaks = u[np.argmax(np.abs(u), axis=0), np.arange(u.shape[1])]
    signs = np.where(peaks < 0, -1.0, 1.0)
    return u * signs, vt * signs[:, None]


def live_rank(canonical: LoraFactors) -> int:
    """How many leading components of canonical factors are above numerical noise."""
    sigmas = np.linalg.norm(canonical.b, axis=0)
    if not len(sigmas) or sigmas[0] == 0:
        return 0
    return int(np.sum(sigmas > DEAD_BELOW * sigmas[0]))


def split(canonical: LoraFactors, how: Split) -> LoraFactors:
    """The same product with S kept in `b` (as the authors' code) or √S on both sides."""
    if how == "sigma_in_b":
        return canonical
    roots = np.sqrt(np.linalg.norm(canonical.b, axis=0))
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    return LoraFactors(canonical.b * inverse, canonical.a * roots[:, None])


def pad(factors: LoraFactors, rank: int, seed: str) -> LoraFactors:
    """Extend to `rank` components that start like a fresh LoRA: `b` zero, `a` uniform in ±1/√in.

    A component that is zero on both sides never gets a gradient; these get one. Each row depends on `seed`
    and its index alone, so that every rank of one version pads alike.
    """
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    out_features, in_features = factors.shape
    rows = [fresh_row(in_features, f"{seed}/{factors.rank + i}") for i in range(missing)]
    b = np.concatenate([factors.b, np.zeros((out_features, missing), np.float32)], axis=1)
    return LoraFactors(b, np.concatenate([factors.a, np.stack(rows)], axis=0))


def fresh_row(in_features: int, seed: str) -> Matrix:
    """One `A` row as peft draws it (Kaiming uniform with a = √5, i.e. ±1/√in), from a text seed."""
    bound = 1.0 / np.sqrt(in_features)
    return text_generator(seed).uniform(-bound, bound, in_features).astype(np.float32)


def text_generator(seed: str) -> np.random.Generator:
    """A generator from a text seed, the same on every machine and in every process."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))


def serve(canonical: LoraFactors, rank: int, how: Split, seed: str) -> LoraFactors:
    """What a device of rank `rank` starts from: the leading live components, split, then padded.

    Split before they are cut, so that the first components have the same bits at every rank.
    """
    live = split(canonical.leading(live_rank(canonical)), how)
    return pad(live.leading(rank), rank, seed)
