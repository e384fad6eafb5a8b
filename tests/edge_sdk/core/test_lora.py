"""Factors, and the scaling that PEFT applies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors, max_rank, peft_module_scaling, peft_scaling, stacked
from tests.edge_sdk.core.draws import addends, dense, factors, seeds

sizes = st.integers(1, 40)


@given(seeds, sizes, sizes, sizes, st.sampled_from([1e-6, 1.0, 1e6]))
def test_norm_is_the_frobenius_norm_of_the_product(
    seed: int, out: int, inp: int, rank: int, scale: float
) -> None:
    f = factors(np.random.default_rng(seed), out, inp, rank, scale)
    wide = f.b.astype(np.float64) @ f.a.astype(np.float64)
    assert f.norm() == pytest.approx(float(np.linalg.norm(wide)), rel=1e-6)


def test_norm_by_hand() -> None:
    f = LoraFactors(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0]]))
    assert f.norm() == 10
    assert (f.rank, f.shape) == (1, (2, 2))
    np.testing.assert_array_equal(f.product(), [[0, 6], [0, 8]])


def test_the_norm_of_a_product_that_cancels_is_not_that_of_its_factors() -> None:
    f = LoraFactors(np.array([[1e3, 1e3]]), np.array([[1.0], [-1.0]]))
    assert f.norm() == 0


@pytest.mark.parametrize(("b", "a"), [((4, 2), (3, 4)), ((4,), (4, 3)), ((4, 2), (2,)), ((4, 2, 1), (1, 3))])
def test_factors_that_do_not_chain_are_refused(b: tuple[int, ...], a: tuple[int, ...]) -> None:
    with pytest.raises(AdapterError, match="do not chain"):
        LoraFactors(np.zeros(b), np.zeros(a))


def test_leading_components_are_views() -> None:
    f = factors(np.random.default_rng(0), 5, 4, 3)
    first = f.leading(2)
    assert first.rank == 2
    assert np.shares_memory(first.b, f.b)
    assert np.shares_memory(first.a, f.a)


@given(addends())
def test_a_stack_is_the_dense_weighted_sum(weighted: list[tuple[float, LoraFactors]]) -> None:
    found, expected = stacked(weighted), dense(weighted)
    assert found.rank == sum(f.rank for _, f in weighted)
    scale = sum(abs(w) * f.norm() for w, f in weighted)
    np.testing.assert_allclose(found.product(), expected, atol=1e-5 * max(scale, 1e-9))


def test_an_empty_update_is_zero() -> None:
    empty = LoraFactors.empty(5, 4)
    assert (empty.rank, empty.shape, empty.norm()) == (0, (5, 4), 0)
    np.testing.assert_array_equal(empty.product(), np.zeros((5, 4)))


def test_max_rank() -> None:
    rng = np.random.default_rng(0)
    assert max_rank({}) == 0
    assert max_rank({"x": factors(rng, 5, 4, 1), "y": factors(rng, 9, 9, 3)}) == 3


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "expected"),
    [
        (8, 16, False, 2.0),
        (16, 16, False, 1.0),
        (16, 16, True, 4.0),
        (64, 8, True, 1.0),
        (3, 1, False, 1 / 3),
    ],
)
def test_scaling_by_hand(rank: int, alpha: float, rslora: bool, expected: float) -> None:
    assert peft_scaling(rank, alpha, rslora) == pytest.approx(expected)


Q0, Q10, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
)
PATTERNS: list[tuple[dict[str, float], dict[str, float]]] = [
    ({}, {Q0: 16, Q10: 16, UP: 16}),
    ({"q_proj": 32}, {Q0: 32, Q10: 32, UP: 16}),
    ({"proj": 32}, {Q0: 16, Q10: 16, UP: 16}),  # a tail begins at a dot
    ({"layers.0.self_attn.q_proj": 32}, {Q0: 32, Q10: 16, UP: 16}),
    ({"0.self_attn.q_proj": 32}, {Q0: 32, Q10: 16, UP: 16}),  # not 10
    ({r"layers\.\d+\.mlp\.up_proj": 8}, {Q0: 16, Q10: 16, UP: 8}),
    ({f"^{Q0}": 4}, {Q0: 4, Q10: 16, UP: 16}),
    ({"q_proj": 32, Q0: 4}, {Q0: 32, Q10: 32, UP: 16}),  # the first match wins
    ({Q0: 4, "q_proj": 32}, {Q0: 4, Q10: 32, UP: 16}),
    ({"layers": 32}, {Q0: 16, Q10: 16, UP: 16}),
]


@pytest.mark.parametrize(("pattern", "alphas"), PATTERNS)
def test_alpha_pattern_by_hand(pattern: dict[str, float], alphas: dict[str, float]) -> None:
    config = {"lora_alpha": 16, "alpha_pattern": pattern}
    for module, alpha in alphas.items():
        assert peft_module_scaling(config, module, 8) == alpha / 8
        assert peft_module_scaling(config | {"use_rslora": True}, module, 4) == alpha / 2


def test_a_config_without_a_pattern() -> None:
    assert peft_module_scaling({"lora_alpha": 16}, Q0, 8) == 2
    assert peft_module_scaling({"lora_alpha": 16, "alpha_pattern": None}, Q0, 8) == 2


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # some must not
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_itself_scales_alike(rslora: bool) -> None:
    """The layers that peft builds for rank_pattern and alpha_pattern, against our reading of its config."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    def tree(names: list[str]) -> Any:
        root = torch.nn.Module()
        for name in names:
            *parents, leaf = name.split(".")
            at = root
            for part in parents:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.add_module(leaf, torch.nn.Linear(12, 12))
        return root

    for pattern, _ in PATTERNS:
        config = peft.LoraConfig(
            r=8,
            lora_alpha=16,
            rank_pattern={"up_proj": 2},
            alpha_pattern=pattern,
            use_rslora=rslora,
            target_modules=["q_proj", "up_proj"],
        )
        model = peft.inject_adapter_in_model(config, tree([Q0, Q10, UP]))
        for name in (Q0, Q10, UP):
            layer = model.get_submodule(name)
            ours = peft_module_scaling(config.to_dict(), name, layer.r["default"])
            assert math.isclose(layer.scaling["default"], ours)
