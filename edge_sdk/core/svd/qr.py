"""The decomposition that is always accurate: orthogonal transformations alone, and no condition is squared.

With `B diag(w) = Q_b R_b` and `Aᵀ = Q_a R_a`, the SVD of the (R, R) core `R_b R_aᵀ` gives that of the product
exactly. From R = min(out, in) on the core would not be smaller than the product, which is formed instead.
"""

from __future__ import annotations

import numpy as np

from edge_sdk.core.svd.stack import Stack, Wide


def safe_svd(stack: Stack, rank: int) -> tuple[Wide, Wide, Wide]:
    """U (out, k), all singular values (falling) and Vᵀ (k, in), with k = min(rank, how many there are).

    Raises:
        AdapterError: a value is not finite.
    """
    stack.require_finite()
    if stack.rank >= min(stack.shape):
        return _by_product(stack, rank)
    q_b, r_b = np.linalg.qr(stack.b())
    q_a, r_a = np.linalg.qr(stack.a().T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u[:, :rank], s, vt[:rank] @ q_a.T


def _by_product(stack: Stack, rank: int) -> tuple[Wide, Wide, Wide]:
    """SVD of the dense sum. A wide one is handed over as its transpose: LAPACK is quicker at tall ones."""
    product = stack.product()
    if product.shape[0] >= product.shape[1]:
        u, s, vt = np.linalg.svd(product, full_matrices=False)
        return u[:, :rank], s, vt[:rank]
    v, s, ut = np.linalg.svd(product.T, full_matrices=False)
    return ut[:rank].T, s, v[:, :rank].T
