"""Which decomposition a stack of updates gets: by shape and stacked rank, checked, with a safe way out.

| stacked rank R | decomposition |
|---|---|
| below FAST_FROM | `safe_svd`: QR of both stacks and the SVD of the core |
| until `dense_pays` | `gram_svd`: Cholesky QR, and of a large core only the wanted part |
| above | `dense_svd`: the dense sum, streamed, and the leading eigenvectors of its Gram matrix |

The last two are as fast as matrix products and lose digits where updates are nearly dependent or cancel.
Their answer carries its measured error; above ACCURACY `safe_svd` is taken instead. How the crossovers were
measured is in docs/PERFORMANCE.md.
"""

from __future__ import annotations

import numpy as np

from edge_sdk.core.svd.dense import dense_svd
from edge_sdk.core.svd.gram import gram_svd
from edge_sdk.core.svd.qr import safe_svd
from edge_sdk.core.svd.stack import Stack
from edge_sdk.core.svd.triplets import Triplets

# Modules of 4096×4096: from R = 8 on twice as quick as QR; of 256×256 from R = 24 on, by parts of a ms.
FAST_FROM = 16

# Operations of `gram_svd` for each R³: two Cholesky factors, the core, and its eigenvectors.
CORE_OPERATIONS = 3.3

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
        fast = dense_svd if dense_pays(stack.shape, stack.rank) else gram_svd
        with np.errstate(over="ignore", invalid="ignore"):  # both end in an error that is not below ACCURACY
            found = fast(stack, kept)
    if found is not None and found.error <= ACCURACY:
        return found
    u, s, vt = safe_svd(stack, kept)
    return Triplets(u, s, vt, float(s @ s), float(s[kept:] @ s[kept:]))


def dense_pays(shape: tuple[int, int], stacked_rank: int) -> bool:
    """Whether forming the sum takes fewer operations than both Gram matrices and the core of the stack.

    For square modules that is from 0.75 of their width on. Measured at 4096×4096, in processor seconds by
    `gram_svd` and by `dense_svd`: R = 3200 6.3 and 6.0, R = 3600 7.7 and 6.2, R = 4000 10.2 and 6.2.
    """
    short, long = sorted(shape)
    gram = (short + long) * stacked_rank**2 + CORE_OPERATIONS * stacked_rank**3
    dense = 2 * short * long * stacked_rank + short**2 * long
    return stacked_rank >= short or dense < gram
