"""Which decomposition a stack of updates gets: by shape and stacked rank, checked, with a safe way out.

| stacked rank R | decomposition |
|---|---|
| below FAST_FROM | `safe_svd`: QR of both stacks and the SVD of the core |
| up to DENSE_FROM·min(out, in) | `gram_svd`: Cholesky QR, and of a large core only the wanted part |
| above | `dense_svd`: the dense sum, streamed, and the leading eigenvectors of its Gram matrix |

The last two are as fast as matrix products and lose digits where updates are nearly dependent or cancel.
Their answer carries its measured error; above ACCURACY `safe_svd` is taken instead. How the crossovers were
measured is in docs/PERFORMANCE.md.
"""

from __future__ import annotations

import numpy as np

from edge_sdk.core.dense_svd import dense_svd
from edge_sdk.core.gram_svd import gram_svd
from edge_sdk.core.safe_svd import safe_svd
from edge_sdk.core.stack import Stack
from edge_sdk.core.triplets import Triplets

FAST_FROM = 16
DENSE_FROM = 0.9

# Largest accepted `Triplets.error`: a tenth of what is promised of singular values. Typical is 1e-14.
ACCURACY = 1e-6


def decompose(stack: Stack, rank: int) -> Triplets:
    """The leading min(rank, R) singular triplets of a stack, by the quickest way that is accurate.

    Raises:
        AdapterError: a value is not finite.
    """
    kept = min(rank, stack.rank)
    found: Triplets | None = None
    if stack.rank >= FAST_FROM:
        fast = dense_svd if stack.rank >= DENSE_FROM * min(stack.shape) else gram_svd
        with np.errstate(over="ignore", invalid="ignore"):  # both end in an error that is not below ACCURACY
            found = fast(stack, kept)
    if found is not None and found.error <= ACCURACY:
        return found
    u, s, vt = safe_svd(stack, kept)
    return Triplets(u, s, vt, float(s @ s), float(s[kept:] @ s[kept:]))
