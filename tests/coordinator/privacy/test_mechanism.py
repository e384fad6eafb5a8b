"""Clipping, sensitivity and noise of a private merge, against dense references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.engine.weights import DISCOUNTS, Discount
from coordinator.privacy.mechanism import (
    Privacy,
    clip_factor,
    leading_components,
    noised,
    noised_sum,
    squared_norm_bound,
)
from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging, SumRule
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix
from tests.edge_sdk.core.draws import dense, factors, seeds

OUT, IN = 9, 7
scales = st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 1e4])
ranks = st.integers(1, 7)


def silent(count: int) -> Matrix:
    return np.zeros(count)


def clipped(adapter: dict[str, LoraFactors], limit: float) -> float:
    return clip_factor(sum(squared_norm_bound(f) for f in adapter.values()), limit)


def drawn_adapter(rng: np.random.Generator, rank: int, scale: float) -> dict[str, LoraFactors]:
    return {name: factors(rng, out, IN, min(rank, out), scale) for name, out in (("q", OUT), ("k", 4))}


def norm_of(adapter: dict[str, LoraFactors], weight: float = 1.0) -> float:
    """Over all modules, from the dense products."""
    return math.sqrt(sum(float(np.sum((weight * dense([(1.0, f)])) ** 2)) for f in adapter.values()))


# --- clipping -------------------------------------------------------------------------------------


@given(seeds, ranks, scales, st.sampled_from([0.01, 1.0, 100.0]))
def test_a_clipped_change_is_no_longer_than_c(seed: int, rank: int, scale: float, limit: float) -> None:
    adapter = drawn_adapter(np.random.default_rng(seed), rank, scale)
    factor = clipped(adapter, limit)
    assert 0 < factor <= 1
    assert norm_of(adapter, factor) <= limit
    if norm_of(adapter) < 0.999 * limit:
        assert factor == 1.0
    else:
        assert norm_of(adapter, factor) >= 0.998 * limit


@given(seeds, st.floats(1e2, 1e7))
def test_factors_that_nearly_cancel_do_not_slip_through(seed: int, size: float) -> None:
    """[u, −u(1 + tiny)]·[v; v]: the terms of the Gram sum are as large as size², the product is not."""
    rng = np.random.default_rng(seed)
    u, v = size * rng.standard_normal((OUT, 1)), rng.standard_normal((1, IN))
    b = np.concatenate([u, -u * (1 + 1e-7)], axis=1).astype(np.float32)
    pair = LoraFactors(b, np.concatenate([v, v]).astype(np.float32))
    exact = float(np.sum((pair.b.astype(np.longdouble) @ pair.a.astype(np.longdouble)) ** 2))
    assert squared_norm_bound(pair) >= exact
    assert clip_factor(squared_norm_bound(pair), 1.0) * math.sqrt(exact) <= 1.0


def test_numbers_by_hand() -> None:
    # Two modules whose products are 3 and 4 in one entry: norm 5, clipped to 1.
    adapter = {"a": LoraFactors(np.array([[3.0]]), np.array([[1.0]]))}
    adapter["b"] = LoraFactors(np.array([[2.0]]), np.array([[2.0]]))
    assert clipped(adapter, 1.0) == pytest.approx(0.2, rel=1e-8)
    assert clipped(adapter, 6.0) == 1.0
    assert Privacy(noise_multiplier=2.0, clip_norm=3.0).noise_std(12) == 0.5


def test_a_zero_change_stays() -> None:
    assert clip_factor(0.0, 1.0) == 1.0


def test_a_norm_that_is_not_finite_is_refused() -> None:
    for norm in (math.inf, math.nan):
        with pytest.raises(AdapterError, match="cannot be clipped"):
            clip_factor(norm, 1.0)


# --- sensitivity ----------------------------------------------------------------------------------


BUFFER_SIZE, LIMIT = 6, 0.7
MODULES = {"q": (OUT, IN), "k": (4, IN)}
Part = tuple[int, int, dict[str, LoraFactors]]
"""An update: the version that it started from, what its device carried, and its factors."""


def versions(seed: int) -> dict[int, dict[str, LoraFactors]]:
    """Three published versions, canonical; version 0 holds nothing."""
    rng = np.random.default_rng([seed, 9])
    return {
        number: {
            name: combine([(1.0, factors(rng, out, inp, 3))], 3).factors
            for name, (out, inp) in MODULES.items()
        }
        for number in (1, 2, 3)
    }


def sums(
    rule: SumRule, parts: list[Part], published: dict[int, dict[str, LoraFactors]], how: Discount
) -> dict[str, Matrix]:
    """What a version adds before noise, of every module, from version 3 on, as the coordinator has it."""
    now, weights = 3, []
    for version, _, adapter in parts:
        started = published.get(version)
        squared = 0.0
        for name, sent in adapter.items():
            begun = started[name] if started else LoraFactors.empty(*MODULES[name])
            squared += squared_norm_bound(rule.change(sent, begun.leading(sent.rank)))
        fixed = DISCOUNTS[how](now - version) / BUFFER_SIZE
        weights.append(clip_factor(squared, LIMIT) * fixed)
    made = {}
    for name in MODULES:
        changes = [
            Change(weight, adapter[name], version, carried)
            for weight, (version, carried, adapter) in zip(weights, parts, strict=True)
        ]
        starts = {v: published[v][name] for v, carried, _ in parts if v and rule.needs_start(1, carried, 3)}
        merging = Merging(published[now][name], changes, now, starts)
        made[name] = noised_sum(rule.addends(merging), 0.0, silent)
    return made


@given(
    seeds,
    st.integers(1, 5),
    st.sampled_from(["carry", "innovation"]),
    st.sampled_from(list(DISCOUNTS)),
    scales,
)
def test_one_update_moves_the_sum_by_at_most_c_over_k(
    seed: int, others: int, name: str, how: Discount, scale: float
) -> None:
    """Left out: by C/K at most; any other adapter in its place: by 2C/K. All modules, before noise."""
    rng, published = np.random.default_rng(seed), versions(seed)
    rule = rule_named(name)
    assert isinstance(rule, SumRule)

    def part(size: float) -> Part:
        version, carried, rank = (int(rng.integers(limit)) for limit in (4, 4, 3))
        return version, carried, drawn_adapter(rng, rank + 1, size)

    rest, mine = [part(1.0) for _ in range(others)], part(scale)
    yours = (*mine[:2], drawn_adapter(rng, 1, 1e4))

    def apart(one: dict[str, Matrix], two: dict[str, Matrix]) -> float:
        return math.sqrt(sum(float(np.sum((one[module] - two[module]) ** 2)) for module in one))

    with_mine = sums(rule, [*rest, mine], published, how)
    assert apart(with_mine, sums(rule, rest, published, how)) <= LIMIT / BUFFER_SIZE
    assert apart(with_mine, sums(rule, [*rest, yours], published, how)) <= 2 * LIMIT / BUFFER_SIZE


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 1e-6, 0.15]))
def test_the_correction_of_a_partly_carried_tail_lengthens_nothing(
    seed: int, tail: int, rank: int, blur: float
) -> None:
    """‖D − PDQ‖ ≤ ‖D‖ for P = UUᵀ and Q = VVᵀ, also where U and V are orthonormal only nearly.

    With D = Σ d_ij p_i q_jᵀ in eigenvectors of P and Q, the difference has (1 − λ_i μ_j) d_ij, and
    0 ≤ λ_i μ_j ≤ 2 as long as the bases are no worse than that.
    """
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((OUT, tail)))[0]
    v = np.linalg.qr(rng.standard_normal((IN, tail)))[0]
    u += blur * u * rng.uniform(-1, 1, tail)
    v += blur * v * rng.uniform(-1, 1, tail)
    change = dense([(1.0, factors(rng, OUT, IN, rank))])
    corrected = change - u @ (u.T @ change @ v) @ v.T
    assert np.linalg.norm(corrected) <= np.linalg.norm(change) * (1 + 1e-12)


# --- noise ----------------------------------------------------------------------------------------


def test_the_noise_is_as_large_as_it_says() -> None:
    """The sample variance of n draws is χ²_n / n: within 6.2 of its standard errors √(2/n), mean likewise."""
    rng, std = np.random.default_rng(5), 0.37
    change = [(0.5, factors(rng, 20, 15, 3))]
    draws = np.stack([noised_sum(change, std, rng.standard_normal) - dense(change) for _ in range(300)])
    n = draws.size
    assert abs(np.mean(draws**2) / std**2 - 1) <= 6.2 * math.sqrt(2 / n)
    assert abs(np.mean(draws)) <= 6.2 * std / math.sqrt(n)
    # Entries are independent of each other: no entry's mean or correlation with its neighbour stands out.
    assert np.abs(draws.mean(axis=0)).max() <= 6.2 * std / math.sqrt(300)
    neighbours = np.mean(draws[:, :, 1:] * draws[:, :, :-1]) / std**2
    assert abs(neighbours) <= 6.2 / math.sqrt(n)


def test_every_entry_gets_its_own_noise_in_a_module_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.privacy.mechanism.BLOCK_VALUES", 10)
    still = [(1.0, LoraFactors(np.zeros((7, 1)), np.zeros((1, 4))))]
    counted: list[int] = []

    def numbers(count: int) -> Matrix:
        counted.append(count)
        return np.arange(sum(counted) - count, sum(counted), dtype=np.float64)

    np.testing.assert_array_equal(noised_sum(still, 1.0, numbers), np.arange(28.0).reshape(7, 4))
    assert counted == [8, 8, 8, 4]


def test_values_that_are_not_finite_are_refused() -> None:
    broken = LoraFactors(np.array([[np.nan]]), np.array([[1.0]]))
    with pytest.raises(AdapterError, match="not finite"):
        noised_sum([(1.0, broken)], 1.0, silent)


# --- what is published of it ----------------------------------------------------------------------


@given(seeds, st.integers(1, 6), st.integers(1, 4))
def test_the_published_factors_are_the_best_of_the_noised_sum(seed: int, rank: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    addends = [(0.5, factors(rng, OUT, IN, 2)) for _ in range(count)]
    noise = rng.standard_normal(OUT * IN)
    total = dense(addends) + 0.3 * noise.reshape(OUT, IN)
    found = noised(addends, 0.3, rank, lambda count: noise[:count])
    s = np.linalg.svd(total, compute_uv=False)
    error = np.linalg.norm(found.factors.product() - total)
    assert error == pytest.approx(math.sqrt(np.sum(s[rank:] ** 2)), rel=1e-4, abs=1e-4)
    assert found.energy == pytest.approx(np.sum(s**2), rel=1e-9)
    assert found.discarded_energy == pytest.approx(np.sum(s[rank:] ** 2), rel=1e-6, abs=1e-9)
    assert found.factors.b.dtype == found.factors.a.dtype == np.float32
    np.testing.assert_allclose(found.factors.a @ found.factors.a.T, np.eye(rank), atol=1e-6)


def test_components_above_the_noise_are_found_without_the_full_decomposition() -> None:
    rng = np.random.default_rng(2)
    signal = 40 * factors(rng, 150, 120, 5).product().astype(np.float64)
    matrix = signal + rng.standard_normal((150, 120))
    u, s, vt = leading_components(matrix, 5)  # 2·(5 + 10) < 120: by subspace iteration
    exact_u, exact_s, exact_vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(s, exact_s[:5], rtol=1e-9)
    np.testing.assert_allclose((u * s) @ vt, (exact_u[:, :5] * exact_s[:5]) @ exact_vt[:5], atol=1e-6)
    assert (u[np.argmax(np.abs(u), axis=0), np.arange(5)] > 0).all()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier is 0.0; it must be above 0"),
        ({"clip_norm": -1.0}, "privacy.clip_norm is -1.0; it must be above 0"),
        ({"max_epsilon": 0.0}, "privacy.max_epsilon is 0.0; it must be above 0"),
        ({"delta": 0.0}, "privacy.delta is 0.0; it must lie between 0 and 1"),
        ({"delta": 1.0}, "privacy.delta is 1.0; it must lie between 0 and 1"),
    ],
)
def test_a_bad_choice_is_named(values: dict[str, float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Privacy(**{"noise_multiplier": 1.0, "clip_norm": 1.0, **values})
