"""Robust rules as functions of a Gram matrix: against the dense vectors that it stands for."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.merging import robust
from coordinator.merging.robust import RobustName, Vector, gram, norms, reweight
from edge_sdk.core.lora import LoraFactors
from tests.edge_sdk.core.draws import factors, seeds

NAMES: tuple[RobustName, ...] = get_args(RobustName)
OUT, IN = 9, 7

ranks = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def plane(*points: tuple[float, float]) -> Vector:
    """The Gram matrix of points in the plane."""
    at = np.array(points)
    return at @ at.T


def equal(count: int) -> Vector:
    return np.full(count, 1 / count)


@given(seeds, ranks)
def test_inner_products_are_those_of_the_dense_updates(seed: int, ranks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    blocks = [factors(rng, OUT, IN, r) if r else LoraFactors.empty(OUT, IN) for r in ranks]
    flat = np.array([f.product().astype(np.float64).ravel() for f in blocks])
    np.testing.assert_allclose(gram(blocks), flat @ flat.T, atol=1e-4)
    np.testing.assert_allclose(norms(gram(blocks)), [f.norm() for f in blocks], rtol=1e-9, atol=1e-9)


def test_inner_products_by_hand() -> None:
    one = LoraFactors(np.array([[1.0], [0.0]]), np.array([[2.0, 0.0]]))  # [[2, 0], [0, 0]]
    two = LoraFactors(np.array([[1.0], [1.0]]), np.array([[3.0, 4.0]]))  # [[3, 4], [3, 4]]
    np.testing.assert_allclose(gram([one, two]), [[4.0, 6.0], [6.0, 50.0]])


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, count=st.integers(1, 8))
def test_weights_sum_to_one_and_factors_only_shorten(name: RobustName, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3)) * 10.0 ** rng.uniform(-6, 6, (count, 1))
    weights = rng.uniform(0.1, 1.0, count)
    found = reweight(name, points @ points.T, weights / weights.sum(), 0.2)
    assert found.weights.sum() == pytest.approx(1.0)
    assert (found.weights >= 0).all()
    assert ((found.factors > 0) & (found.factors <= 1)).all()


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, count=st.integers(1, 6), scale=st.sampled_from([1e-9, 1.0, 1e9]))
def test_the_unit_of_length_does_not_matter(name: RobustName, seed: int, count: int, scale: float) -> None:
    points = np.random.default_rng(seed).standard_normal((count, 3))
    once = reweight(name, points @ points.T, equal(count), 0.2)
    again = reweight(name, scale**2 * (points @ points.T), equal(count), 0.2)
    np.testing.assert_allclose(again.weights, once.weights, atol=1e-5)
    np.testing.assert_allclose(again.factors, once.factors, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_changes_that_are_all_zero_are_merged_as_they_are(name: RobustName) -> None:
    found = reweight(name, np.zeros((3, 3)), np.array([0.5, 0.3, 0.2]), 0.3)
    assert np.isfinite(found.weights).all()
    assert found.weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["none", "norm_median", "geometric_median"])
@given(seed=seeds, count=st.integers(1, 6))
def test_equal_changes_are_merged_whole(name: RobustName, seed: int, count: int) -> None:
    point = np.random.default_rng(seed).standard_normal((1, 4))
    same = np.repeat(point, count, axis=0)
    found = reweight(name, same @ same.T, equal(count), 0.2)
    np.testing.assert_allclose((found.weights * found.factors) @ same, point[0], rtol=1e-6)


def test_norm_median_by_hand() -> None:
    found = robust.norm_median(plane((1, 0), (0, 2), (3, 0), (0, 200)), equal(4))
    np.testing.assert_allclose(found.factors, [1, 1, 2 / 3, 0.01])
    np.testing.assert_allclose(found.weights, equal(4))


def test_the_geometric_median_of_a_line_is_its_weighted_median() -> None:
    at = plane((1, 0), (2, 0), (3, 0), (1000, 0))
    found = robust.geometric_median(at, np.array([0.2, 0.4, 0.2, 0.2]))
    assert found.weights @ [1, 2, 3, 1000] == pytest.approx(2.0, abs=0.01)


@given(seeds, st.integers(3, 7))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3))
    weights = rng.uniform(0.1, 1.0, count)
    weights /= weights.sum()

    def cost(at: Vector) -> float:
        return float(weights @ np.linalg.norm(points - at, axis=1))

    found = robust.geometric_median(points @ points.T, weights).weights @ points
    nudges = 0.05 * rng.standard_normal((20, 3))
    assert cost(found) <= min(cost(found + nudge) for nudge in nudges) + 1e-3
    assert cost(found) <= min(cost(point) for point in points) + 1e-3


def test_less_than_half_cannot_carry_the_geometric_median_away() -> None:
    honest = [(1.0, 0.1 * k) for k in range(-3, 4)]
    for far in (1e2, 1e4, 1e8):
        points = [*honest, (-far, 0.0), (-far, 1.0)]
        found = robust.geometric_median(plane(*points), equal(9)).weights @ np.array(points)
        assert math.dist(found, (1.0, 0.0)) < 0.2
        plain = equal(9) @ np.array(points)
        assert math.dist(plain, (1.0, 0.0)) > 10


@pytest.mark.parametrize(
    ("share", "kept"), [(0.2, [0, 1, 3]), (0.25, [0, 1, 3]), (0.26, [0, 1]), (0.99, [0])]
)
def test_trimming_leaves_out_the_longest(share: float, kept: list[int]) -> None:
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    found = robust.trimmed(plane((1, 0), (0, 2), (300, 0), (2, 2)), weights, share)
    left = [weights[k] if k in kept else 0.0 for k in range(4)]
    np.testing.assert_allclose(found.weights, np.array(left) / sum(left))
