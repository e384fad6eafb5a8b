"""The leading eigenpairs of a large symmetric positive semidefinite matrix, by block Lanczos iteration.

Golub and Underwood 1977 with full orthogonalisation; for what a random start guarantees see Musco and Musco,
NeurIPS 2015, arXiv:1504.05477. The basis grows by one block M·Q a step until every residual is below a
tolerance. The start comes from a fixed seed: equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_sdk.core.svd.stack import Wide

OVERSAMPLED = 16  # columns of a block beyond those wanted: close followers of the last wanted one
STEPS_BETWEEN_CHECKS = 2  # a check costs an eigh of the basis, as much as a step
MAX_STEPS = 12  # as dear as the full eigenvectors of a matrix of 2000 rows

# A residual above this after so many steps: it would not converge in MAX_STEPS (measured on spectra that fall
# by 10 %, 3 % and 0.1 % from one singular value to the next; those that converged were at most at 0.003).
HOPELESS_AFTER = 6
HOPELESS_ABOVE = 0.01


def leading_eigenpairs(
    apply: Callable[[Wide], Wide], size: int, count: int, tolerance: float
) -> tuple[Wide, Wide] | None:
    """The `count` largest eigenvalues (falling) and their vectors (size, count) of a matrix M.

    Args:
        apply: M·X for X of shape (size, p).
        size: rows of M.
        count: eigenpairs wanted.
        tolerance: bound on every ‖M v − λ v‖ as a share of the largest eigenvalue. Some eigenvalue of M is
            then as near to λ; it is nearer by far where λ stands apart.

    Returns:
        None where M is small or its spectrum too flat for this to pay; a full decomposition is quicker.
    """
    block = count + OVERSAMPLED
    steps = min(MAX_STEPS, size // (2 * block))
    if steps < STEPS_BETWEEN_CHECKS:
        return None
    basis = np.empty((size, block * (steps + 1)), order="F")  # leading columns are then one piece of memory
    projected = np.zeros((block * steps, block * steps))  # basisᵀ M basis
    basis[:, :block], _ = np.linalg.qr(np.random.default_rng(0).standard_normal((size, block)))
    for step in range(1, steps + 1):
        width = step * block
        so_far, newest = basis[:, :width], slice(width - block, width)
        image = apply(basis[:, newest])
        column = so_far.T @ image
        projected[:width, newest] = column
        projected[newest, :width] = column.T
        image -= so_far @ column
        image -= so_far @ (so_far.T @ image)  # once more: the first time leaves rounding of the size of M
        following, reach = np.linalg.qr(image)
        if np.abs(np.diagonal(reach)).min() <= 1e-8 * np.abs(projected).max():
            # Where M has nothing new in some direction that column is arbitrary; it must be orthogonal still.
            following, _ = np.linalg.qr(following - so_far @ (so_far.T @ following))
        basis[:, width : width + block] = following
        if step % STEPS_BETWEEN_CHECKS == 0:
            values, vectors = np.linalg.eigh(projected[:width, :width])
            values, vectors = values[: -count - 1 : -1], vectors[:, : -count - 1 : -1]
            # M·basis leaves the basis through its newest block alone.
            residual = np.linalg.norm(reach @ vectors[newest], axis=0).max()
            if residual <= tolerance * values[0]:
                return values, so_far @ vectors
            if step >= HOPELESS_AFTER and residual > HOPELESS_ABOVE * values[0]:
                return None
    return None
