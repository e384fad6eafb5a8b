"""The decomposition that runs at the speed of matrix products: through the Gram matrices of both stacks.

`BᵀB = F_b F_bᵀ` by Cholesky, so that `B = Q_b F_bᵀ` with `Q_b = B F_b⁻ᵀ` (Cholesky QR; Yamamoto et al. 2015,
ETNA 44), and likewise for Aᵀ. The core `C = F_bᵀ diag(w) F_a` has the singular values of the product; Q_b and
Q_a are never formed, because the wanted vectors are `U = B (F_b⁻ᵀ u)` and `V = Aᵀ (F_a⁻ᵀ v)`. A Gram matrix
squares the condition of its stack. So the answer is compared with the updates themselves (`Triplets.error`),
and the caller takes another path if it is not good enough.

Columns are scaled to norm 1 first: Cholesky then sees only how nearly parallel updates are, and not that one
of them is a million times another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.core.svd.krylov import leading_eigenpairs
from edge_sdk.core.svd.stack import Stack, Wide
from edge_sdk.core.svd.triplets import PROBES, Triplets, orthonormality_error, tail_energy

# Eigenvalues of a scaled Gram matrix below this share of the largest are dependent columns and rounding.
DEPENDENT_BELOW = 1e-13

# C Cᵀ squares the core once more: V = Cᵀu/σ is orthonormal to 1e-16·(σ_1/σ)². Below this share of σ_1 an SVD
# of the core is taken, which costs two (R = 314) to three times (R = 640) as much as eigenvectors of C Cᵀ.
SQUARED_CORE_DOWN_TO = 1e-4

# Size of the core from which the wanted eigenpairs alone are computed, and its least ratio to their number.
# All of `gram_svd` with 64 of them, where the spectrum lets it converge and where not: R = 1000 as quick and
# 1.2× slower, R = 2000 1.3 to 1.5× quicker and 1.1× slower.
TRUNCATED_FROM = 1500
TRUNCATED_RATIO = 8

# Residual of an eigenpair of C Cᵀ as a share of σ_1²: that of the triplet is 1e-8·σ_1/σ of σ_1, and the error
# of σ smaller still.
EIGEN_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Half:
    """One stack M of R columns: `gram` = MᵀM, and `M = Q factorᵀ` with `Q = M (scale · inverse)`; (R, R′)."""

    gram: Wide
    factor: Wide
    scale: Wide
    by_eigenvalues: Wide | None

    def spread(self, u: Wide) -> Wide:
        """X with `Q u = M X`."""
        if self.by_eigenvalues is not None:
            return self.scale[:, None] * (self.by_eigenvalues @ u)
        unscaled = self.factor * self.scale[:, None]
        return self.scale[:, None] * solve_upper(unscaled.T, u)


def gram_svd(stack: Stack, rank: int) -> Triplets | None:
    """The leading `rank` triplets, or None where the stack has fewer components that are not rounding.

    Raises:
        AdapterError: a value is not finite.
    """
    left, right = _half(stack.gram_b()), _half(stack.gram_a())
    if left is None or right is None:
        stack.require_finite()
        return None  # squares overflowed
    if min(left.factor.shape[1], right.factor.shape[1]) < rank:
        return None
    core = left.factor.T @ (stack.weights[:, None] * right.factor)
    energy = float(np.sum(core**2))
    if not 0.0 < energy < np.inf:
        stack.require_finite()
        return None
    u, s, v = _leading(core, rank)
    x, y = left.spread(u), right.spread(v)
    probe = np.random.default_rng(1).standard_normal((rank, PROBES))
    wide_u, b_seen = stack.left(x, probe)
    vt, a_seen = stack.right(y, probe)
    # ΔW·V g − U S g = B (w·(A V g) − x S g), whose norm the Gram matrix gives without another pass over B.
    weights, scaled = stack.weights[:, None], s[:rank, None] * probe
    errors = (
        _norms(left.gram, weights * a_seen - x @ scaled).max() / s[0],
        _norms(right.gram, weights * b_seen - y @ scaled).max() / s[0],
        orthonormality_error(wide_u),
        orthonormality_error(vt.T),
    )
    complete = len(s) >= min(core.shape)
    return Triplets(wide_u, s, vt, energy, tail_energy(s, rank, energy, complete), float(np.max(errors)))


def _half(gram: Wide) -> Half | None:
    """Factor a Gram matrix: Cholesky, or by eigenvalues where columns depend on one another."""
    squares = np.diagonal(gram)
    if not np.isfinite(squares).all():
        return None
    norms: Wide = np.sqrt(squares)
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    scaled = gram * scale * scale[:, None]  # a column of zeros makes a row of zeros: not positive definite
    try:
        return Half(gram, norms[:, None] * np.linalg.cholesky(scaled), scale, None)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(scaled)
        live = values > DEPENDENT_BELOW * values[-1]
        roots = np.sqrt(values[live])
        return Half(gram, norms[:, None] * (vectors[:, live] * roots), scale, vectors[:, live] / roots)


def _leading(core: Wide, count: int) -> tuple[Wide, Wide, Wide]:
    """U (R, count), σ (all of them, or the leading ones), V (R, count) of the core."""
    size = core.shape[0]
    if size >= max(TRUNCATED_FROM, TRUNCATED_RATIO * count):
        found = leading_eigenpairs(lambda x: core @ (core.T @ x), size, count, EIGEN_TOLERANCE)
        if found is not None and found[0][-1] > SQUARED_CORE_DOWN_TO**2 * found[0][0]:
            s = np.sqrt(found[0])
            return found[1], s, core.T @ found[1] / s
    values, vectors = np.linalg.eigh(core @ core.T)
    s = np.sqrt(np.maximum(values[::-1], 0.0))
    if s[count - 1] > SQUARED_CORE_DOWN_TO * s[0]:
        u = vectors[:, : -count - 1 : -1]
        return u, s, core.T @ u / s[:count]
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    return u[:, :count], s, vt[:count].T


def solve_upper(upper: Wide, right: Wide) -> Wide:
    """X with `upper @ X = right`, for an upper triangular matrix: by halves, so that products do the work."""
    size = len(upper)
    if size <= 64:
        return np.linalg.solve(upper, right).astype(np.float64, copy=False)
    half = size // 2
    below = solve_upper(upper[half:, half:], right[half:])
    above = solve_upper(upper[:half, :half], right[:half] - upper[:half, half:].dot(below))
    return np.concatenate([above, below])


def _norms(gram: Wide, z: Wide) -> Wide:
    """‖M z‖ of every column from the Gram matrix of M."""
    norms: Wide = np.sqrt(np.maximum(np.sum(z * (gram @ z), axis=0), 0.0))
    return norms
