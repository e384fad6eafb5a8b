"""ε at δ against formulas written down here, independently of the library."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.privacy import accountant
from coordinator.privacy.accountant import entries_left, epsilon, precision
from edge_sdk.core.errors import InputError

pytest.importorskip("dp_accounting")

multipliers = st.sampled_from([0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 4.0, 10.0])
deltas = st.sampled_from([1e-3, 1e-5, 1e-8])


def normal(x: float) -> float:
    """Φ(x), with its relative precision kept in the lower tail."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def analytic_delta(z: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8, for sensitivity 1: Φ(1/2z − εz) − e^ε Φ(−1/2z − εz)."""
    return normal(0.5 / z - eps * z) - math.exp(eps) * normal(-0.5 / z - eps * z)


def analytic_epsilon(z: float, delta: float) -> float:
    """The ε at which the formula falls to δ, by bisection: it falls as ε grows."""
    low, high = 0.0, 1.0
    while analytic_delta(z, high) > delta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if analytic_delta(z, middle) > delta else (low, middle)
    return high


@given(multipliers, deltas)
def test_one_version_is_the_analytic_gaussian_mechanism(z: float, delta: float) -> None:
    assert epsilon({z: 1}, delta) == pytest.approx(analytic_epsilon(z, delta), rel=1e-6)


@given(multipliers, st.integers(1, 40), deltas)
def test_n_versions_cost_what_one_with_a_root_n_th_of_the_noise_does(z: float, n: int, delta: float) -> None:
    z_all = max(z, 0.1 * math.sqrt(n))  # e^ε must stay a float in the formula above
    assert epsilon({z_all: n}, delta) == pytest.approx(
        analytic_epsilon(z_all / math.sqrt(n), delta), rel=1e-6
    )


def test_a_known_value() -> None:
    """z = 1, δ = 1e-5: 4.377 (the same by the privacy loss distribution of the library, below)."""
    assert epsilon({1.0: 1}, 1e-5) == pytest.approx(4.3772, abs=1e-4)


def test_unequal_multipliers_compose_as_the_librarys_general_accountant_says() -> None:
    """Its numerical composition of privacy loss distributions rounds up, by at most its grid."""
    library = accountant.library()
    general = library.pld.PLDAccountant()
    general.compose(library.GaussianDpEvent(2.0), 3)
    general.compose(library.GaussianDpEvent(1.5), 2)
    numerical = general.get_epsilon(1e-5)
    exact = epsilon({2.0: 3, 1.5: 2}, 1e-5)
    assert exact == pytest.approx(numerical, abs=1e-3)
    assert exact <= numerical + 1e-9


def test_who_entered_nothing_has_spent_nothing() -> None:
    assert epsilon({}, 1e-5) == 0.0
    assert epsilon({1.0: 0}, 1e-5) == 0.0


@given(multipliers, st.integers(0, 30), deltas)
def test_more_versions_cost_more(z: float, n: int, delta: float) -> None:
    assert epsilon({z: n}, delta) < epsilon({z: n + 1}, delta)
    assert precision({z: n}) < precision({z: n + 1})


@given(multipliers, multipliers, st.integers(0, 5), st.floats(0.1, 60.0))
def test_what_is_left_is_the_most_that_fits(z: float, earlier: float, before: int, budget: float) -> None:
    spent = {earlier: before}
    left = entries_left(spent, z, 1e-5, budget)

    def after(more: int) -> float:
        together = dict(spent)
        together[z] = together.get(z, 0) + more
        return epsilon(together, 1e-5)

    assert left == 0 or after(left) <= budget
    assert after(left + 1) > budget


def test_a_budget_that_nobody_uses_up_ends_the_search() -> None:
    assert entries_left({}, 1e9, 1e-5, 1.0) >= 1 << 29


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    accountant.library.cache_clear()
    try:
        with pytest.raises(InputError, match=r"pip install 'flexlora-edge\[privacy\]'"):
            accountant.library()
    finally:
        accountant.library.cache_clear()
