"""combine against the dense SVD, and the laws that it obeys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_sdk.core import flexlora
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.svd import decompose
from tests.edge_sdk.core.draws import addends, dense, factors, seeds

TOLERANCE = 1e-5  # of the largest singular value

Weighted = list[tuple[float, LoraFactors]]


def wide(f: LoraFactors) -> Matrix:
    """The product in float64."""
    return f.b.astype(np.float64) @ f.a.astype(np.float64)


def truncated(matrix: Matrix, rank: int) -> Matrix:
    """The reference: SVD of the dense matrix, first `rank` components."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def size_of(weighted: Weighted) -> float:
    """A bound on ‖ΔW‖ before cancellation: what rounding is relative to."""
    return sum(abs(w) * f.norm() for w, f in weighted)


def ranks(data: st.DataObject, weighted: Weighted) -> int:
    return data.draw(st.integers(1, min(weighted[0][1].shape)), label="rank")


# --- by hand --------------------------------------------------------------------------------------


def test_two_clients_by_hand() -> None:
    """3/4·4·e1e1ᵀ + 1/4·8·e2e2ᵀ = diag(3, 2): rank 1 keeps the 3 and drops 2² = 4 of 13."""
    first = LoraFactors(np.array([[4.0], [0.0]]), np.array([[1.0, 0.0]]))
    second = LoraFactors(np.array([[0.0], [8.0]]), np.array([[0.0, 1.0]]))
    both = combine([(0.75, first), (0.25, second)], 2)
    np.testing.assert_allclose(both.factors.b, [[3, 0], [0, 2]], atol=1e-6)
    np.testing.assert_allclose(both.factors.a, [[1, 0], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(both.singular_values, [3, 2])
    assert both.discarded_energy == 0
    one = combine([(0.75, first), (0.25, second)], 1)
    np.testing.assert_allclose(one.factors.product(), [[3, 0], [0, 0]], atol=1e-6)
    assert one.discarded_energy == pytest.approx(4)
    assert one.energy == pytest.approx(13)


def test_averaging_the_factors_would_be_wrong() -> None:
    """The mean of the products of e1e1ᵀ and e2e2ᵀ is half the identity; the product of the means is not."""
    first = LoraFactors(np.array([[1.0], [0.0]]), np.array([[1.0, 0.0]]))
    second = LoraFactors(np.array([[0.0], [1.0]]), np.array([[0.0, 1.0]]))
    np.testing.assert_allclose(
        combine([(0.5, first), (0.5, second)], 2).factors.product(), [[0.5, 0], [0, 0.5]], atol=1e-7
    )


# --- against the dense reference ------------------------------------------------------------------


@given(addends(), st.data())
def test_agrees_with_the_dense_svd(weighted: Weighted, data: st.DataObject) -> None:
    matrix = dense(weighted)
    rank = ranks(data, weighted)
    got = combine(weighted, rank)
    s = np.linalg.svd(matrix, compute_uv=False)
    scale = max(float(s[0]), 1e-9 * size_of(weighted))  # exact cancellation leaves rounding only
    known = len(got.singular_values)
    np.testing.assert_allclose(got.singular_values, s[:known], rtol=0, atol=TOLERANCE * scale)
    np.testing.assert_allclose(s[known:], 0, rtol=0, atol=TOLERANCE * scale)
    error = np.linalg.norm(wide(got.factors) - matrix, 2)
    best = s[rank] if rank < len(s) else 0.0
    assert error <= best + TOLERANCE * scale
    gap = s[rank - 1] - best
    if gap > 1e-6 * scale:  # only then is the best approximation unique
        np.testing.assert_allclose(wide(got.factors), truncated(matrix, rank), rtol=0, atol=TOLERANCE * scale)


@given(addends(), st.data())
def test_thin_and_dense_paths_agree(weighted: Weighted, data: st.DataObject) -> None:
    rank = ranks(data, weighted)
    results = []
    for pays in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decompose, "FAST_FROM", 1)
            patch.setattr(decompose, "dense_pays", lambda shape, rank, pays=pays: pays)
            results.append(combine(weighted, rank))
    by_dense, by_stack = results
    scale = max(by_dense.singular_values[0], 1e-9 * size_of(weighted))
    shared = min(len(by_dense.singular_values), len(by_stack.singular_values))
    np.testing.assert_allclose(
        by_dense.singular_values[:shared], by_stack.singular_values[:shared], rtol=0, atol=TOLERANCE * scale
    )
    matrix = dense(weighted)
    for result in results:
        residual = np.linalg.norm(matrix - wide(result.factors)) ** 2
        assert residual == pytest.approx(result.discarded_energy, abs=TOLERANCE * scale**2)


@pytest.mark.parametrize(("out", "inp", "stack"), [(64, 48, 8), (48, 64, 47), (64, 48, 48), (40, 40, 200)])
def test_both_sides_of_the_crossover(out: int, inp: int, stack: int) -> None:
    rng = np.random.default_rng(stack)
    weighted = [(0.1 * (i + 1), factors(rng, out, inp, 1)) for i in range(stack)]
    got = combine(weighted, 8)
    s = np.linalg.svd(dense(weighted), compute_uv=False)
    np.testing.assert_allclose(
        wide(got.factors), truncated(dense(weighted), 8), rtol=0, atol=TOLERANCE * s[0]
    )


# --- best of its rank -----------------------------------------------------------------------------


@given(addends(), st.data(), seeds)
@settings(max_examples=50)
def test_no_other_matrix_of_that_rank_is_nearer(weighted: Weighted, data: st.DataObject, seed: int) -> None:
    """Eckart-Young against random subspaces, with the best fit inside each, and against near misses."""
    matrix, rank = dense(weighted), ranks(data, weighted)
    got = combine(weighted, rank)
    distance = np.linalg.norm(matrix - wide(got.factors))
    rng = np.random.default_rng(seed)
    for nudge in (1e-3, 0.1, 1.0, 1e3):
        columns = got.factors.a.T + nudge * rng.standard_normal((matrix.shape[1], got.factors.rank))
        q, _ = np.linalg.qr(columns)
        other = np.linalg.norm(matrix - matrix @ q @ q.T)
        assert distance <= other + TOLERANCE * size_of(weighted)


@given(addends(), st.data())
def test_discarded_energy_is_the_tail(weighted: Weighted, data: st.DataObject) -> None:
    rank = ranks(data, weighted)
    got = combine(weighted, rank)
    s = np.linalg.svd(dense(weighted), compute_uv=False)
    whole = size_of(weighted) ** 2
    assert got.discarded_energy == pytest.approx(float(np.sum(s[rank:] ** 2)), abs=1e-9 * whole)
    assert got.energy == pytest.approx(float(np.sum(s**2)), abs=1e-9 * whole)


# --- the canonical form ---------------------------------------------------------------------------


@given(addends(), st.data())
def test_canonical_form(weighted: Weighted, data: st.DataObject) -> None:
    got = combine(weighted, ranks(data, weighted)).factors
    assert got.b.dtype == got.a.dtype == np.float32
    np.testing.assert_allclose(got.a @ got.a.T, np.eye(got.rank), atol=1e-5)
    norms = np.linalg.norm(got.b.astype(np.float64), axis=0)
    gram = got.b.astype(np.float64).T @ got.b
    np.testing.assert_allclose(gram, np.diag(norms**2), atol=1e-5 * max(norms[0] ** 2, 1e-30))
    assert (np.diff(norms) <= 1e-6 * norms[0]).all()


@given(addends(), st.data())
def test_the_same_input_gives_the_same_bytes(weighted: Weighted, data: st.DataObject) -> None:
    rank = ranks(data, weighted)
    first, second = combine(weighted, rank).factors, combine(weighted, rank).factors
    assert first.b.tobytes() == second.b.tobytes()
    assert first.a.tobytes() == second.a.tobytes()


def test_the_sign_of_a_component_is_fixed() -> None:
    """(−b)(−a) is b·a: both spellings of an update come back as one."""
    f = factors(np.random.default_rng(0), 9, 7, 3)
    turned = LoraFactors(-f.b, -f.a)
    one, other = combine([(1.0, f)], 3).factors, combine([(1.0, turned)], 3).factors
    np.testing.assert_allclose(one.b, other.b, atol=1e-6)
    np.testing.assert_allclose(one.a, other.a, atol=1e-6)
    peaks = one.b[np.abs(one.b).argmax(axis=0), np.arange(3)]
    assert (peaks > 0).all()


# --- linearity ------------------------------------------------------------------------------------


@given(addends(), st.sampled_from([2.0, -3.0, 0.125]))
def test_scaling_every_weight_scales_the_sum(weighted: Weighted, by: float) -> None:
    full = min(weighted[0][1].shape)
    once = combine(weighted, full)
    scaled = combine([(by * w, f) for w, f in weighted], full)
    limit = TOLERANCE * abs(by) * size_of(weighted)
    np.testing.assert_allclose(wide(scaled.factors), by * wide(once.factors), rtol=0, atol=limit)
    np.testing.assert_allclose(scaled.singular_values, abs(by) * once.singular_values, rtol=0, atol=limit)


@given(addends(min_count=2), st.data())
def test_the_sum_of_parts_is_the_whole(weighted: Weighted, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(weighted) - 1))
    full = min(weighted[0][1].shape)
    parts = [(1.0, combine(part, full).factors) for part in (weighted[:cut], weighted[cut:])]
    limit = TOLERANCE * size_of(weighted)
    np.testing.assert_allclose(
        wide(combine(parts, full).factors), wide(combine(weighted, full).factors), rtol=0, atol=limit
    )


@given(addends(min_count=2), st.randoms(use_true_random=False))
def test_order_does_not_matter(weighted: Weighted, order: object) -> None:
    shuffled = list(weighted)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    full = min(weighted[0][1].shape)
    limit = TOLERANCE * size_of(weighted)
    np.testing.assert_allclose(
        wide(combine(shuffled, full).factors), wide(combine(weighted, full).factors), rtol=0, atol=limit
    )


@given(addends(max_count=1))
def test_one_addend_comes_back(weighted: Weighted) -> None:
    weight, f = weighted[0]
    got = combine(weighted, f.rank)
    np.testing.assert_allclose(
        wide(got.factors), weight * wide(f), rtol=0, atol=TOLERANCE * abs(weight) * f.norm()
    )
    assert got.discarded_energy <= (TOLERANCE * abs(weight) * f.norm()) ** 2


@given(addends())
def test_an_update_and_its_negative_cancel(weighted: Weighted) -> None:
    undone = [*weighted, *((-w, f) for w, f in weighted)]
    assert combine(undone, 1).energy <= (1e-12 * size_of(undone)) ** 2 * min(weighted[0][1].shape)


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_to_combine() -> None:
    with pytest.raises(AdapterError, match="nothing to combine"):
        combine([], 1)


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_that_does_not_fit_is_named(rank: int) -> None:
    f = factors(np.random.default_rng(0), 5, 3, 2)
    with pytest.raises(AdapterError, match=rf"rank {rank} .*\(5, 3\).*at most 3"):
        combine([(1.0, f)], rank)


def test_unequal_shapes_are_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(AdapterError, match=r"\(5, 3\) and \(3, 5\)"):
        combine([(1.0, factors(rng, 5, 3, 1)), (1.0, factors(rng, 3, 5, 1))], 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["weight", "b", "a"])
def test_values_that_are_not_finite_are_refused(value: float, where: str) -> None:
    f = factors(np.random.default_rng(0), 5, 3, 2)
    if where != "weight":
        getattr(f, where)[0, 0] = value
    with pytest.raises(AdapterError, match="not finite"):
        combine([(value if where == "weight" else 1.0, f)], 1)


# --- what a device is served ----------------------------------------------------------------------


@given(addends(signed=False), st.data())
def test_balanced_split_keeps_the_product(weighted: Weighted, data: st.DataObject) -> None:
    canonical = combine(weighted, ranks(data, weighted)).factors
    canonical = canonical.leading(flexlora.live_rank(canonical))
    assume(canonical.rank)
    balanced = flexlora.split(canonical, "balanced")
    np.testing.assert_allclose(
        wide(balanced), wide(canonical), rtol=0, atol=TOLERANCE * np.linalg.norm(canonical.b[:, 0])
    )
    np.testing.assert_allclose(
        np.linalg.norm(balanced.b, axis=0), np.linalg.norm(balanced.a, axis=1), rtol=1e-4
    )
    assert flexlora.split(canonical, "sigma_in_b") is canonical


def test_balanced_split_of_a_dead_component_is_zero_and_finite() -> None:
    canonical = LoraFactors(np.array([[2.0, 0.0], [0.0, 0.0]]), np.eye(2))
    balanced = flexlora.split(canonical, "balanced")
    np.testing.assert_allclose(balanced.b, [[2**0.5, 0], [0, 0]])
    np.testing.assert_allclose(balanced.a, [[2**0.5, 0], [0, 0]])


@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(0, 12))
def test_padding_keeps_the_product(seed: int, out: int, inp: int, more: int) -> None:
    f = factors(np.random.default_rng(seed), out, inp, min(out, inp))
    padded = flexlora.pad(f, f.rank + more, "s")
    assert padded.rank == f.rank + more
    assert padded.b.dtype == padded.a.dtype == np.float32
    np.testing.assert_allclose(padded.product(), f.product(), rtol=0, atol=1e-6 * f.norm())
    fresh = padded.a[f.rank :]
    assert not padded.b[:, f.rank :].any()
    assert (np.abs(fresh) <= 1 / np.sqrt(inp)).all()
    assert (np.linalg.norm(fresh, axis=1) > 0).all()


def test_every_rank_pads_alike() -> None:
    f = factors(np.random.default_rng(0), 16, 12, 2)
    largest = flexlora.pad(f, 9, "federation/3/layer")
    for rank in range(1, 10):
        padded = flexlora.pad(f, rank, "federation/3/layer")
        expected = largest.leading(max(rank, 2))
        np.testing.assert_array_equal(padded.a, expected.a)
        np.testing.assert_array_equal(padded.b, expected.b)
    fewer_live = flexlora.pad(f.leading(1), 9, "federation/3/layer")
    np.testing.assert_array_equal(fewer_live.a[2:], largest.a[2:])  # a row belongs to its index
    other = flexlora.pad(f, 9, "federation/4/layer")
    assert not np.array_equal(other.a[2:], largest.a[2:])


def test_a_fresh_row_is_drawn_like_peft_does() -> None:
    """Uniform in ±1/√in: mean 0, variance 1/(3·in). 10000 draws: five standard errors either way."""
    row = flexlora.fresh_row(10_000, "seed") * np.sqrt(10_000)
    assert np.abs(row).max() <= 1
    assert abs(row.mean()) < 5 * np.sqrt(1 / 3 / 10_000)
    assert abs(row.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / 10_000)


@given(seeds, st.integers(1, 6), st.integers(6, 14))
def test_live_rank_of_an_exact_low_rank_sum(seed: int, true_rank: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    whole = factors(rng, size, size, true_rank)
    weighted = [(0.3, whole), (0.5, LoraFactors(whole.b[:, ::-1].copy(), whole.a[::-1].copy()))]
    assert flexlora.live_rank(combine(weighted, size).factors) == true_rank


def test_live_rank_of_nothing() -> None:
    assert flexlora.live_rank(LoraFactors(np.zeros((4, 2)), np.zeros((2, 3)))) == 0
    assert flexlora.live_rank(LoraFactors(np.zeros((4, 0)), np.zeros((0, 3)))) == 0


@pytest.mark.parametrize("how", ["sigma_in_b", "balanced"])
def test_serving_replaces_dead_components(how: flexlora.Split) -> None:
    """A global update of rank 2 served at rank 4: two components of it, two that can learn."""
    f = factors(np.random.default_rng(3), 8, 6, 2)
    canonical = combine([(1.0, f)], 2).factors
    dead = LoraFactors(np.pad(canonical.b, ((0, 0), (0, 3))), np.pad(canonical.a, ((0, 3), (0, 0))))
    served = flexlora.serve(dead, 4, how, "seed")
    assert served.rank == 4
    np.testing.assert_allclose(served.product(), f.product(), rtol=0, atol=1e-5 * f.norm())
    assert not served.b[:, 2:].any()
    assert (np.linalg.norm(served.a, axis=1) > 0).all()
    again = flexlora.serve(dead, 4, how, "seed")
    assert served.b.tobytes() + served.a.tobytes() == again.b.tobytes() + again.a.tobytes()


def test_serving_a_smaller_rank_is_the_truncation() -> None:
    f = factors(np.random.default_rng(4), 8, 6, 5)
    canonical = combine([(1.0, f)], 5).factors
    served = flexlora.serve(canonical, 3, "sigma_in_b", "seed")
    np.testing.assert_array_equal(served.b, canonical.b[:, :3])
    np.testing.assert_array_equal(served.a, canonical.a[:3])


def test_serving_an_empty_federation_is_a_fresh_lora() -> None:
    served = flexlora.serve(LoraFactors(np.zeros((8, 0)), np.zeros((0, 6))), 4, "balanced", "seed")
    assert served.rank == 4
    assert not served.product().any()
    assert (np.linalg.norm(served.a, axis=1) > 0).all()
