"""A sparse warm-up before low-rank training: some input columns of each weight are trained first.

SLoRA (Babakniya et al. 2023, arXiv:2308.06522) trains a random sparse set of weights for the first rounds,
the same set on all devices, and starts LoRA from the SVD of what came out: random factors would need long to
find directions that suit unlike devices. Here the set is made of whole input columns, where the paper
scatters entries: a matrix that is zero but for the columns J is a product `b @ a` with the selector of J as
`a`, so that the update is a pair of factors like any other and needs no wire, no merge and no memory of its
own. The devices train `b` alone. A device of rank r trains the first r columns of one order, and states of
all devices average to the whole matrix, whatever their ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import text_generator
from edge_sdk.core.lora import LoraFactors


def drawn_columns(in_features: int, rank: int, seed: str) -> npt.NDArray[np.intp]:
    """The first `rank` input columns of the order that `seed` draws, (rank,); the same at every version."""
    if not 1 <= rank <= in_features:
        raise AdapterError(f"{rank} columns of {in_features} cannot be drawn")
    return text_generator(f"columns/{seed}").permutation(in_features)[:rank]


def serve_columns(stored: LoraFactors, rank: int, seed: str) -> LoraFactors:
    """What a device of `rank` starts from: its columns of the global update, and their selector.

    Args:
        stored: the global factors, rank 0 for version 0.
        rank: columns to train.
        seed: the same for all versions and devices of a module.

    Returns:
        `b` (out, rank), those columns of `stored.b @ stored.a`; `a` (rank, in), one 1 in each row.
    """
    out_features, in_features = stored.shape
    columns = drawn_columns(in_features, rank, seed)
    selector = np.zeros((rank, in_features), np.float32)
    selector[np.arange(rank), columns] = 1.0
    return LoraFactors((stored.b @ stored.a[:, columns]).reshape(out_features, rank), selector)
