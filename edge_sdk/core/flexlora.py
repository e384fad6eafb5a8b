"""FlexLoRA: the weighted sum of LoRA updates of unequal ranks, and its best approximation of any rank.

Bai et al., NeurIPS 2024, arXiv:2402.11505, section 3: `ΔW = Σ w_k B̃_k A_k`, `ΔW = U S Vᵀ`, and a device
of rank r gets the first r components. The dense ΔW is not formed where the stack is thin: with
`B = [w_1 B̃_1 … w_K B̃_K]` (out, R) and `A = [A_1; …; A_K]` (R, in), `B = Q_b R_b`, `Aᵀ = Q_a R_a`, the SVD
of the (R, R) core `R_b R_aᵀ` gives that of `BA` exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors, Matrix

Split = Literal["sigma_in_b", "balanced"]

# A component whose singular value is below this share of the largest is numerical noise of float32 input.
DEAD_BELOW = 1e-6

# From this stacked rank on, as a share of min(out, in), the dense product is formed instead.
DENSE_FROM = 1.0


@dataclass(frozen=True)
class Combined:
    """A truncated sum. `factors` is canonical: `b = U·S` (columns by falling σ), `a = Vᵀ` (orthonormal rows).

    `singular_values` are all of the sum's, so that `energy` is ‖ΔW‖² and `discarded_energy` what truncation
    dropped of it, exactly.
    """

    factors: LoraFactors
    singular_values: npt.NDArray[np.float64]

    @property
    def energy(self) -> float:
        """‖ΔW‖²_F of the sum before truncation."""
        return float(np.sum(self.singular_values**2))

    @property
    def discarded_energy(self) -> float:
        """Σ σ_i² over the components that truncation dropped."""
        return float(np.sum(self.singular_values[self.factors.rank :] ** 2))


def combine(addends: Sequence[tuple[float, LoraFactors]], rank: int) -> Combined:
    """The best rank-`rank` approximation of `Σ w_k b_k a_k`.

    Args:
        addends: (weight, factors) pairs of one module, any mixture of ranks, weights of any sign.
        rank: components to keep, 1 ≤ rank ≤ min(out, in); fewer come back if the stack holds fewer.

    Returns:
        Canonical float32 factors and every singular value of the sum (computed in float64).

    Raises:
        AdapterError: no addends, unequal shapes, a value that is not finite, or an impossible rank.
    """
    if not addends:
        raise AdapterError("nothing to combine: the list of updates is empty")
    shape = addends[0][1].shape
    for _, factors in addends:
        if factors.shape != shape:
            raise AdapterError(f"cannot combine shapes {shape} and {factors.shape}")
    if not 1 <= rank <= min(shape):
        raise AdapterError(f"rank {rank} does not fit a module of shape {shape}; at most {min(shape)}")
    b = np.concatenate([weight * f.b.astype(np.float64) for weight, f in addends], axis=1)
    a = np.concatenate([f.a.astype(np.float64) for _, f in addends], axis=0)
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        raise AdapterError("an update holds values that are not finite")
    u, s, vt = _svd_of_product(b, a)
    kept = min(rank, len(s))
    u, vt = _with_fixed_signs(u[:, :kept], vt[:kept])
    factors = LoraFactors((u * s[:kept]).astype(np.float32), vt.astype(np.float32))
    return Combined(factors, s)


def _svd_of_product(b: Matrix, a: Matrix) -> tuple[Matrix, npt.NDArray[np.float64], Matrix]:
    """Thin SVD of `b @ a` through the smaller of its core and itself."""
    if b.shape[1] >= DENSE_FROM * min(b.shape[0], a.shape[1]):
        u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
        return u, s, vt
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, s, vt @ q_a.T


def _with_fixed_signs(u: Matrix, vt: Matrix) -> tuple[Matrix, Matrix]:
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
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    bound = 1.0 / np.sqrt(in_features)
    return np.random.default_rng(number).uniform(-bound, bound, in_features).astype(np.float32)


def serve(canonical: LoraFactors, rank: int, how: Split, seed: str) -> LoraFactors:
    """What a device of rank `rank` starts from: the leading live components, split, then padded.

    Split before they are cut, so that the first components have the same bits at every rank.
    """
    live = split(canonical.leading(live_rank(canonical)), how)
    return pad(live.leading(rank), rank, seed)
