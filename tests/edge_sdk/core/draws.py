"""Random factors for the tests of the core."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from edge_sdk.core.lora import LoraFactors, Matrix

seeds = st.integers(0, 2**32 - 1)


def factors(rng: np.random.Generator, out: int, inp: int, rank: int, scale: float = 1.0) -> LoraFactors:
    """Gaussian factors (out, rank) and (rank, inp) in float32, as they come off the wire."""
    b = rng.standard_normal((out, rank)).astype(np.float32) * np.float32(scale)
    return LoraFactors(b, rng.standard_normal((rank, inp)).astype(np.float32))


@st.composite
def addends(
    draw: st.DrawFn, min_count: int = 1, max_count: int = 6, signed: bool = True
) -> list[tuple[float, LoraFactors]]:
    """Weighted factors of one module: 1..40 by 1..40, every rank, weights of any sign and zero."""
    out, inp = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    count = draw(st.integers(min_count, max_count))
    ranks = draw(st.lists(st.integers(1, min(out, inp)), min_size=count, max_size=count))
    some = st.sampled_from([0.0, 1.0, 0.5, 0.01, *([-1.0, -0.25] if signed else [])])
    weights = draw(st.lists(some, min_size=count, max_size=count))
    rng = np.random.default_rng(draw(seeds))
    scales = draw(st.lists(st.sampled_from([1e-3, 1.0, 30.0]), min_size=count, max_size=count))
    rows = zip(weights, ranks, scales, strict=True)
    return [(weight, factors(rng, out, inp, rank, scale)) for weight, rank, scale in rows]


def dense(weighted: list[tuple[float, LoraFactors]]) -> Matrix:
    """The naive sum: every product formed, in float64."""
    return sum(w * (f.b.astype(np.float64) @ f.a.astype(np.float64)) for w, f in weighted)  # type: ignore[return-value]
