"""The two rules against the dense matrices that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rules import merge_module
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.messages import Rule
from tests.core.draws import dense, factors, seeds

RULES: tuple[Rule, ...] = ("flexlora", "carry")
OUT, IN, CAP = 9, 7, 7  # the cap holds every rank, so that nothing is truncated

Weighted = list[tuple[float, LoraFactors]]


def drawn(seed: int, ranks: list[int]) -> Weighted:
    """Updates of these ranks, with weights that sum to 1 as the engine's do."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1.0, len(ranks))
    return [(float(w), factors(rng, OUT, IN, r)) for w, r in zip(weights / weights.sum(), ranks, strict=True)]


def merged(rule: Rule, current: LoraFactors | None, updates: Weighted, eta: float = 1.0) -> Matrix:
    return merge_module(rule, current, updates, eta, CAP).factors.product()


def close(actual: Matrix, expected: Matrix) -> None:
    """Equal to 1e-5 of the largest singular value."""
    assert np.abs(actual - expected).max() <= 1e-5 * max(1e-9, float(np.linalg.norm(expected, 2)))


ranks = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(seeds, ranks)
def test_flexlora_is_the_dense_weighted_average(seed: int, ranks: list[int]) -> None:
    updates = drawn(seed, ranks)
    current = factors(np.random.default_rng(seed + 1), OUT, IN, 5)
    close(merged("flexlora", current, updates), dense(updates))


@given(seeds, ranks, st.sampled_from([0.25, 0.5, 1.5]))
def test_flexlora_with_another_learning_rate_keeps_the_rest_of_the_old(
    seed: int, ranks: list[int], eta: float
) -> None:
    updates = drawn(seed, ranks)
    current = factors(np.random.default_rng(seed + 1), OUT, IN, 5)
    close(
        merged("flexlora", current, updates, eta),
        (1 - eta) * dense([(1.0, current)]) + eta * dense(updates),
    )


@given(seeds, ranks, st.sampled_from([0.25, 1.0, 1.5]))
def test_carry_adds_the_changes_to_the_global_adapter(seed: int, ranks: list[int], eta: float) -> None:
    updates = drawn(seed, ranks)
    current = factors(np.random.default_rng(seed + 1), OUT, IN, 5)
    close(merged("carry", current, updates, eta), dense([(1.0, current)]) + eta * dense(updates))


@pytest.mark.parametrize("rule", RULES)
@given(seed=seeds, ranks=ranks, eta=st.sampled_from([0.5, 1.0]))
def test_version_0_counts_as_zero(rule: Rule, seed: int, ranks: list[int], eta: float) -> None:
    updates = drawn(seed, ranks)
    close(merged(rule, None, updates, eta), eta * dense(updates))


@pytest.mark.parametrize("rule", RULES)
@given(seed=seeds, rank=st.integers(1, 7), weights=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_equal_devices_give_that_devices_product(
    rule: Rule, seed: int, rank: int, weights: list[int]
) -> None:
    same = factors(np.random.default_rng(seed), OUT, IN, rank)
    updates = [(weight / sum(weights), same) for weight in weights]
    close(merged(rule, None, updates), dense([(1.0, same)]))


@pytest.mark.parametrize("rule", RULES)
def test_numbers_by_hand(rule: Rule) -> None:
    one = LoraFactors(np.array([[1.0], [0.0]]), np.array([[2.0, 0.0]]))  # [[2, 0], [0, 0]]
    two = LoraFactors(np.array([[0.0], [1.0]]), np.array([[0.0, 8.0]]))  # [[0, 0], [0, 8]]
    old = LoraFactors(np.array([[1.0], [0.0]]), np.array([[0.0, 1.0]]))  # [[0, 1], [0, 0]]
    result = merge_module(rule, old, [(0.25, one), (0.75, two)], 1.0, 2).factors.product()
    expected = [[0.5, 1.0 if rule == "carry" else 0.0], [0.0, 6.0]]
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_cap_keeps_the_largest_components_and_knows_what_it_dropped(rule: Rule) -> None:
    sizes = np.array([5.0, 3.0, 1.0])
    update = LoraFactors(np.diag(sizes), np.eye(3))
    result = merge_module(rule, None, [(1.0, update)], 1.0, 2)
    np.testing.assert_allclose(result.factors.product(), np.diag([5.0, 3.0, 0.0]), atol=1e-6)
    assert (result.energy, result.discarded_energy) == pytest.approx((35.0, 1.0))


def test_a_cap_above_the_module_is_the_modules_own() -> None:
    update = factors(np.random.default_rng(0), 3, 5, 2)
    assert merge_module("carry", None, [(1.0, update)], 1.0, 99).factors.shape == (3, 5)
