"""Staleness weights: numbers by hand, and what every function must obey."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.engine import weights


@pytest.mark.parametrize(("tau", "weight"), [(0, 1.0), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_polynomial_by_hand(tau: int, weight: float) -> None:
    assert weights.polynomial(tau) == pytest.approx(weight)


def test_polynomial_of_another_exponent() -> None:
    assert weights.polynomial(3, a=1.0) == 0.25
    assert weights.polynomial(3, a=0.0) == 1


@pytest.mark.parametrize(("tau", "weight"), [(0, 1.0), (4, 1.0), (5, 1 / 11), (6, 1 / 21)])
def test_hinge_by_hand(tau: int, weight: float) -> None:
    assert weights.hinge(tau) == pytest.approx(weight)


def test_hinge_stays_below_one_for_a_small_slope() -> None:
    assert weights.hinge(5, a=0.5, b=4) == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("name", list(weights.DISCOUNTS))
@given(tau=st.integers(0, 10_000))
def test_weights_fall_and_lie_in_0_1(name: weights.Discount, tau: int) -> None:
    weight = weights.DISCOUNTS[name]
    assert weight(0) == 1
    assert 0 < weight(tau + 1) <= weight(tau) <= 1


def test_every_name_has_its_function() -> None:
    assert set(weights.DISCOUNTS) == {"constant", "polynomial", "hinge"}
    assert [f(7) == 1 for f in weights.DISCOUNTS.values()] == [True, False, False]
