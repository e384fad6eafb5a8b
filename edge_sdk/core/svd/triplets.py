"""Singular triplets of a stack, and how far they are from what they claim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.core.svd.stack import Wide

PROBES = 4  # random directions in which an answer is compared with the updates


@dataclass(frozen=True)
class Triplets:
    """The leading k singular triplets of ΔW: `u` (out, k), `s` (at least k, falling), `vt` (k, in).

    `energy` is ‖ΔW‖²_F and `discarded_energy` what of it lies beyond the first k. `error` is the largest of
    the departures of U and V from orthonormal, and of `ΔW·V g − U S g` and `ΔWᵀ·U g − V S g` for random g as
    a share of σ_1; 0 where only orthogonal transformations were used.
    """

    u: Wide
    s: Wide
    vt: Wide
    energy: float
    discarded_energy: float
    error: float = 0.0


def orthonormality_error(q: Wide) -> float:
    """The largest entry of |QᵀQ − I|."""
    return float(np.abs(q.T @ q - np.eye(q.shape[1])).max(initial=0.0))


def tail_energy(s: Wide, kept: int, energy: float, complete: bool) -> float:
    """Σ σ² beyond the first `kept`: summed where all σ are known, else the rest of the whole."""
    if complete:
        return float(np.sum(s[kept:] ** 2))
    return max(0.0, energy - float(np.sum(s[:kept] ** 2)))
