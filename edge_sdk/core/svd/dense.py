"""The decomposition of a sum of so many updates that their stack is no thinner than the module itself.

The dense sum P (out ≤ in) is formed a block of columns at a time and goes into `P Pᵀ` at once, so that memory
holds one square of the smaller side and never P. Its leading eigenvectors are U, its trace the energy, and
`V = Pᵀ U / σ` comes from the updates again.
"""

from __future__ import annotations

import numpy as np

from edge_sdk.core.svd.gram import EIGEN_TOLERANCE, SQUARED_CORE_DOWN_TO
from edge_sdk.core.svd.krylov import leading_eigenpairs
from edge_sdk.core.svd.stack import Stack, Wide
from edge_sdk.core.svd.triplets import PROBES, Triplets, orthonormality_error, tail_energy


def dense_svd(stack: Stack, rank: int) -> Triplets | None:
    """The leading `rank` triplets, or None where one of them is too small to be told from rounding.

    Raises:
        AdapterError: a value is not finite.
    """
    if stack.shape[0] > stack.shape[1]:
        turned = dense_svd(stack.transposed(), rank)
        if turned is None:
            return None
        return Triplets(
            turned.vt.T, turned.s, turned.u.T, turned.energy, turned.discarded_energy, turned.error
        )
    gram = _gram_of_sum(stack)
    energy = float(np.trace(gram))
    if not 0.0 < energy < np.inf:
        stack.require_finite()
        return None
    found = leading_eigenpairs(lambda x: gram @ x, len(gram), rank, EIGEN_TOLERANCE)
    if found is None:
        values, vectors = np.linalg.eigh(gram)
        found = np.maximum(values[::-1], 0.0), vectors[:, : -rank - 1 : -1]
    values, u = found
    if values[rank - 1] <= SQUARED_CORE_DOWN_TO**2 * values[0]:
        return None
    s = np.sqrt(values)
    u = np.ascontiguousarray(u)
    weights = stack.weights[:, None]
    vt, a_seen = stack.right(weights * stack.left_transposed(u) / s[:rank], _probe(rank))
    forward, _ = stack.left(weights * a_seen, np.zeros((PROBES, 0)))
    error = max(
        float(np.linalg.norm(forward - u @ (s[:rank, None] * _probe(rank)), axis=0).max() / s[0]),
        orthonormality_error(u),
        orthonormality_error(vt.T),
    )
    return Triplets(u, s, vt, energy, tail_energy(s, rank, energy, len(s) == len(gram)), error)


def _probe(rank: int) -> Wide:
    return np.random.default_rng(1).standard_normal((rank, PROBES))


def _gram_of_sum(stack: Stack) -> Wide:
    """P Pᵀ, (out, out)."""
    gram = np.zeros((stack.shape[0], stack.shape[0]))
    for _, block in stack.product_blocks():
        gram += block @ block.T
    return gram
