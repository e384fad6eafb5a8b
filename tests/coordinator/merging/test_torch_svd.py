"""The accelerator's decomposition, here on CPU tensors, against numpy's; and how its absence is said."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.merging.torch_svd import decompose_on, torch_decompose
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.flexlora import combine
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.core.svd.stack import Stack
from tests.edge_sdk.core.draws import factors


@pytest.mark.parametrize("ranks", [[4, 8, 20], [40, 40]], ids=["thin", "dense"])
def test_torch_and_numpy_agree(ranks: list[int]) -> None:
    rng = np.random.default_rng(0)
    weighted = [(0.5 - 0.4 * n, factors(rng, 90, 70, rank)) for n, rank in enumerate(ranks)]
    ours = combine(weighted, 6)
    theirs = combine(weighted, 6, lambda stack, rank: torch_decompose(stack, rank, "cpu"))
    scale = ours.singular_values[0]
    np.testing.assert_allclose(theirs.singular_values[:6], ours.singular_values[:6], rtol=1e-10)
    np.testing.assert_allclose(theirs.factors.b, ours.factors.b, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(theirs.factors.a, ours.factors.a, rtol=0, atol=1e-5)
    assert theirs.energy == pytest.approx(ours.energy)
    assert theirs.discarded_energy == pytest.approx(ours.discarded_energy)


def test_torch_refuses_what_is_not_finite() -> None:
    f = factors(np.random.default_rng(0), 9, 7, 3)
    f.a[0, 0] = np.nan
    with pytest.raises(AdapterError, match="not finite"):
        torch_decompose(Stack([(1.0, f)]), 2, "cpu")


def test_the_cpu_is_numpy() -> None:
    assert decompose_on("cpu") is decompose


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"--device cuda:9 cannot be used \(.+\); leave --device out"):
        decompose_on("cuda:9")
    with pytest.raises(InputError, match="--device gpu cannot be used"):
        decompose_on("gpu")
