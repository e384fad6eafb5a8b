"""Gaussian noise that nobody can draw again.

Differential privacy promises nothing to somebody who can repeat the noise. A generator made for simulations
(PCG64, the Mersenne twister) is repeatable from its seed, and its state can be worked out from enough of
its output; who knows or guesses the other updates of a version sees much of that output. So each value is
made from fresh bytes of the operating system's cryptographic generator; there is no seed, and no setting
for one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Normals = Callable[[int], npt.NDArray[np.float64]]
"""Number of values to that many independent draws of N(0, 1)."""


def system_normals(count: int) -> npt.NDArray[np.float64]:
    """`count` draws of N(0, 1) from the operating system's generator.

    Box and Muller 1958 (Annals of Mathematical Statistics 29): √(−2 ln U)·(cos 2πV, sin 2πV), U and V of 64
    bits each. U = (w + ½)·2⁻⁶⁴ is never 0 and keeps its relative precision near 0, so that the tail reaches
    9.5 σ: what lies beyond has probability 3·10⁻²⁰ a pair.

    The values are float64 numbers, not reals; docs/PRIVACY.md says what that means for the guarantee.
    """
    pairs = -(-count // 2)
    words = np.frombuffer(os.urandom(16 * pairs), np.uint64).reshape(2, pairs)
    radius = np.sqrt(-2.0 * np.log((words[0].astype(np.float64) + 0.5) * 2.0**-64))
    angle = words[1].astype(np.float64) * (2.0 * np.pi * 2.0**-64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
