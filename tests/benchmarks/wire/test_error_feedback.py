"""The law that error feedback rests on, so that docs/WIRE.md speaks of the real thing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.wire.error_feedback import corrected, next_residual
from edge_sdk.core.adapter_file.dtypes import WireDtype, pack, unpack
from edge_sdk.core.lora import LoraFactors
from tests.edge_sdk.core.draws import factors, seeds

SHAPE, RANK = (40, 24), 3
lossy = st.sampled_from(["float16", "int8"])


def sent_over(f: LoraFactors, dtype: WireDtype) -> LoraFactors:
    return unpack(pack(f, 2.0, dtype).tensors, 2.0)


@given(seed=seeds, dtype=lossy, uploads=st.integers(1, 5))
@settings(max_examples=40)
def test_what_was_received_and_the_last_residual_are_what_was_trained(
    seed: int, dtype: WireDtype, uploads: int
) -> None:
    draw, residual = np.random.default_rng(seed), None
    trained, received = np.zeros(SHAPE), np.zeros(SHAPE)
    for _ in range(uploads):
        change = factors(draw, *SHAPE, RANK)
        arrived = sent_over(corrected(change, residual), dtype)
        assert arrived.rank == RANK
        residual = next_residual(change, residual, arrived, min(SHAPE))
        trained, received = trained + change.product(), received + arrived.product()
    assert residual is not None
    error = np.linalg.norm(received + residual.product() - trained)
    assert error < 1e-5 * np.linalg.norm(trained)
    assert residual.norm() > 1e-5 * np.linalg.norm(trained)  # there is something that the law is about


@given(seed=seeds)
@settings(max_examples=20)
def test_a_residual_that_is_cut_keeps_the_largest_part(seed: int) -> None:
    draw = np.random.default_rng(seed)
    change = factors(draw, *SHAPE, RANK)
    arrived = sent_over(change, "int8")
    whole, part = (next_residual(change, None, arrived, cap) for cap in (min(SHAPE), RANK))
    assert part.rank == RANK
    np.testing.assert_allclose(part.product(), whole.leading(RANK).product(), atol=1e-5 * whole.norm())
