"""Central differential privacy of one device's updates: clipping, fixed weights, dense Gaussian noise.

A version adds η·(Σ w_k f_k D_k + N) to the global adapter:

- D_k, what device k changed, over all modules; its norm is the Frobenius norm of the products B̃·A;
- f_k = min(1, C/‖D_k‖): no device moves the sum by more than its weight times C;
- w_k = s(τ_k)/K with K the buffer size, s ≤ 1: a number that no other device's presence, and nothing that the
  device says of itself, changes. So one update is worth C/K at most: the sensitivity;
- N: independent N(0, (z·C/K)²) in every entry of every module.

Everything later (truncation to the rank cap, serving, energies, the next version's start) is computed from
the noised sum and costs nothing more. Noise goes on the dense sum and not on factors: with B + N_b and A +
N_a the product is off by B·N_a + N_b·A + N_b·N_a, whose size depends on the very factors that it should
hide, and which no bound on ‖BA‖ calibrates. docs/PRIVACY.md has the argument in full, and what is not
protected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coordinator.privacy.gaussian_noise import Normals, system_normals
from coordinator.rules.rule import Merging, NewFactors, Ranks, Rule, SumRule
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.flexlora import live_rank, with_fixed_signs
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.svd.stack import Stack

Dense = npt.NDArray[np.float64]

# By so much less than C is a change clipped: what rounding in float64 may add to it until it is in the sum.
# The correction for a partly carried tail needs no margin: D − PDQ with P = U_t U_tᵀ and Q = V_t V_tᵀ
# multiplies the part of D along eigenvectors of P and Q by 1 − p·q. With eigenvalues p, q in [0, 1] that
# lies in [0, 1]; bases stored in float32, orthonormal to 1e-6 only, take it to −2·10⁻⁶. No part of a change
# gets longer.
MARGIN = 1e-9

OVERSAMPLING = 10  # columns beyond the rank in the search for its subspace (Halko et al. 2011, section 4.2)
POWER_STEPS = 4  # noise has a flat spectrum, in which a subspace settles slowly
BLOCK_VALUES = 1 << 20  # noise is drawn and added so many values at a time


@dataclass(frozen=True)
class Privacy:
    """The host's choices, `[privacy]` of the configuration."""

    noise_multiplier: float  # z: standard deviation of the noise over the sensitivity C/K
    clip_norm: float  # C: the longest change of a device that counts in full
    delta: float = 1e-5  # of the ε that is reported; well below 1 over the number of devices
    max_epsilon: float | None = None  # a device takes part until its next update would exceed this

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "clip_norm", "max_epsilon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"privacy.{name} is {value}; it must be above 0")
        if not 0 < self.delta < 1:
            raise InputError(f"privacy.delta is {self.delta}; it must lie between 0 and 1")

    def noise_std(self, buffer_size: int) -> float:
        """z·C/K: standard deviation of the noise in each entry of the sum."""
        return self.noise_multiplier * self.clip_norm / buffer_size

    def noise(self, buffer_size: int, normals: Normals = system_normals) -> Noise:
        """What a merge needs to know of it."""
        return Noise(self.noise_multiplier, self.clip_norm, self.noise_std(buffer_size), normals)


@dataclass(frozen=True)
class Noise:
    """How one merge is made private: z, the longest change, σ of the noise, and where it comes from."""

    multiplier: float
    clip_norm: float
    std: float
    normals: Normals


class NoisedSum(Rule):
    """A rule's sum with noise in every entry: what is stored of it is all that the cap allows."""

    dense = True

    def __init__(self, rule: SumRule, noise: Noise) -> None:
        self._rule, self._noise = rule, noise

    def merge(self, merging: Merging, rank: int) -> NewFactors:
        """The best approximation of the noised sum."""
        std = merging.eta * self._noise.std
        return noised(self._rule.addends(merging), std, rank, self._noise.normals)

    def stored_rank(self, ranks: Ranks, shape: tuple[int, int], rank_cap: int, eta: float) -> int:
        """Noise has every direction."""
        return min(rank_cap, *shape)


def squared_norm_bound(change: LoraFactors) -> float:
    """Never less than ‖BA‖²_F of one module, from Gram matrices in float64.

    tr((BᵀB)(AAᵀ)) is a sum in which large terms may cancel, so that rounding could make it too small. Its
    error is below (out + in + r² + 2)·u·‖B‖²‖A‖² (Higham 2002, equation 3.13 for each inner product, and
    Σ_ij (|B|ᵀ|B|)_ij (|A||A|ᵀ)_ij = ‖|B||A|‖² ≤ ‖B‖²‖A‖²), which is added.
    """
    b, a = change.b.astype(np.float64), change.a.astype(np.float64)
    squared = float(np.sum((b.T @ b) * (a @ a.T)))
    terms = sum(change.shape) + change.rank**2 + 2
    rounding = terms * float(np.finfo(np.float64).eps)
    return max(0.0, squared) + rounding * float(np.sum(b * b)) * float(np.sum(a * a))


def clip_factor(squared_norm: float, clip_norm: float) -> float:
    """min(1, C/‖D‖), a little less: of a whole adapter, whose modules' squared norms are added up.

    Raises:
        AdapterError: the norm is not finite.
    """
    if not math.isfinite(squared_norm):
        raise AdapterError(f"the change has norm {math.sqrt(squared_norm)}, which cannot be clipped")
    norm, limit = math.sqrt(squared_norm), clip_norm * (1.0 - MARGIN)
    return 1.0 if norm <= limit else limit / norm


def noised(
    addends: Sequence[tuple[float, LoraFactors]], std: float, rank: int, normals: Normals
) -> NewFactors:
    """The best rank-`rank` approximation of `Σ w_k b_k a_k + N`, of one module.

    Args:
        addends: (weight, factors): the global adapter and the clipped changes, η included.
        std: standard deviation of N, η included.
        rank: components to keep, at most min(out, in).
        normals: where the noise comes from.

    Returns:
        Canonical factors; both energies are those of the noised sum.

    Memory: the dense sum in float64 once, out·in·8 bytes; factors and blocks beside it are thin.
    """
    total = noised_sum(addends, std, normals)
    u, s, vt = leading_components(total, rank)
    energy, kept = float(np.vdot(total, total)), float(np.sum(s**2))
    factors = LoraFactors((u * s).astype(np.float32), vt.astype(np.float32))
    return NewFactors(factors, live_rank(factors), energy, max(0.0, energy - kept))


def noised_sum(addends: Sequence[tuple[float, LoraFactors]], std: float, normals: Normals) -> Dense:
    """`Σ w_k b_k a_k + N` of one module, (out, in), in float64: what differential privacy releases."""
    total = Stack(addends).product()
    if not np.isfinite(total).all():
        raise AdapterError("an update holds values that are not finite")
    columns = total.shape[1]
    step = max(1, BLOCK_VALUES // columns)
    for begin in range(0, len(total), step):
        block = total[begin : begin + step]
        block += std * normals(block.size).reshape(block.shape)
    return total


def leading_components(matrix: Dense, rank: int) -> tuple[Dense, Dense, Dense]:
    """The first `rank` of the singular value decomposition, signs fixed: U (out, rank), σ, Vᵀ (rank, in).

    By subspace iteration from a random start (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm
    4.4), because a full decomposition of a large module takes minutes; in full where the rank is not much
    smaller than the module.
    """
    wide = rank + OVERSAMPLING
    if 2 * wide >= min(matrix.shape):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        # The start of the search is no secret: what it finds is computed from the noised sum alone.
        q = np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], wide)))[0]
        for _ in range(POWER_STEPS):
            q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ q)[0])[0]
        inner, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ inner
    u, vt = with_fixed_signs(u[:, :rank], vt[:rank])
    return u, s[:rank], vt
