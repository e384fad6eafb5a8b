"""How much an assignment can change a model, from its rate and steps alone: a bound that nobody has to teach.

A step of Adam moves each value by about its learning rate at most, whatever the gradient (Kingma and Ba,
ICLR 2015, arXiv:1412.6980, section 2.1). So k steps at the rate ρ move B̃, into which the scaling s is folded,
and A by at most

    β = s·ρ·k·√(out·r),   α = ρ·k·√(r·in),   and their product by
    ‖B̃A − B̃₀A₀‖_F ≤ β‖A₀‖₂ + ‖B̃₀‖₂α + αβ,

where β and α are Frobenius norms. Who sends more did not do what was assigned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edge_sdk.core.flexlora import FRESH_ROWS
from edge_sdk.core.lora import LoraFactors, Matrix


@dataclass(frozen=True)
class Sizes:
    """Largest singular value and Frobenius norm of the factors that a device begins with in one module."""

    spectral_b: float
    spectral_a: float
    frobenius_b: float
    frobenius_a: float


@dataclass(frozen=True)
class Reach:
    """What honest training of one module stays within, but for a small factor.

    `change`: ‖B̃A − B̃₀A₀‖_F. `b`, `a`: ‖B̃‖_F and ‖A‖_F at the end.
    """

    change: float
    b: float
    a: float


def fresh_sizes(shape: tuple[int, int], rank: int) -> Sizes:
    """Of fresh factors on top of a frozen adapter: B = 0, and rows of A uniform in ±FRESH_ROWS/√in.

    The largest singular value of such an A is near σ(√in + √r), with σ² = FRESH_ROWS²/(3·in) (Bai and Yin
    1993, Annals of Probability 21(3)).
    """
    deviation = FRESH_ROWS / math.sqrt(3.0)
    return Sizes(0.0, deviation * (1.0 + math.sqrt(rank / shape[1])), 0.0, deviation * math.sqrt(rank))


def sizes(factors: LoraFactors) -> Sizes:
    """Of factors that were served."""
    return Sizes(_spectral(factors.b.T), _spectral(factors.a), frobenius(factors.b), frobenius(factors.a))


def _spectral(rows: Matrix) -> float:
    """The largest singular value of a few long rows, by their Gram matrix."""
    if not rows.size:
        return 0.0
    wide = rows.astype(np.float64)
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(wide @ wide.T)[-1])))


def frobenius(values: Matrix) -> float:
    """The Frobenius norm, in float64: squares of what a stranger sends may leave float32."""
    return float(np.linalg.norm(values.astype(np.float64)))


def reach(begun: Sizes, shape: tuple[int, int], rank: int, moved: float, scaling: float) -> Reach:
    """How far training gets.

    Args:
        begun: of what the device begins with.
        shape: (out, in) of the module.
        rank: that is trained.
        moved: ρ·k, the most that a value moves: learning rate × steps.
        scaling: s.
    """
    out_features, in_features = shape
    b = scaling * moved * math.sqrt(out_features * rank)
    a = moved * math.sqrt(rank * in_features)
    change = b * begun.spectral_a + begun.spectral_b * a + a * b
    return Reach(change, begun.frobenius_b + b, begun.frobenius_a + a)
