"""Every decomposition of a stack against the SVD of the dense sum, and the way out where one is not exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.svd import decompose as decompose_module
from edge_sdk.core.svd import gram as gram_module
from edge_sdk.core.svd import stack as stack_module
from edge_sdk.core.svd.decompose import decompose
from edge_sdk.core.svd.dense import dense_svd
from edge_sdk.core.svd.gram import gram_svd, solve_upper
from edge_sdk.core.svd.krylov import leading_eigenpairs
from edge_sdk.core.svd.qr import safe_svd
from edge_sdk.core.svd.stack import Stack
from edge_sdk.core.svd.triplets import Triplets
from tests.edge_sdk.core.draws import addends, dense, factors, seeds

Weighted = list[tuple[float, LoraFactors]]
Path = Callable[[Stack, int], Triplets | None]


def safe(stack: Stack, rank: int) -> Triplets:
    u, s, vt = safe_svd(stack, rank)
    return Triplets(u, s, vt, float(np.sum(s**2)), float(np.sum(s[rank:] ** 2)))


def falling(out: int, inp: int, ranks: list[int], by: float = 0.9) -> Weighted:
    """Updates of these ranks whose components fall like trained ones."""
    rng = np.random.default_rng(0)
    made = [factors(rng, out, inp, rank) for rank in ranks]
    return [(1 / len(ranks), LoraFactors(f.b * by ** np.arange(f.rank, dtype=np.float32), f.a)) for f in made]


def assert_leading(found: Triplets, weighted: Weighted, tolerance: float = 1e-9) -> None:
    """Triplets of the dense reference: values, subspaces (as projections), energies."""
    matrix = dense(weighted)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = found.u.shape[1]
    np.testing.assert_allclose(found.s[:kept], s[:kept], rtol=0, atol=tolerance * s[0])
    for got, wanted in ((found.u, u[:, :kept]), (found.vt.T, vt[:kept].T)):
        np.testing.assert_allclose(got.T @ got, np.eye(kept), rtol=0, atol=max(tolerance, 1e-7))
        if s[kept - 1] - (s[kept] if kept < len(s) else 0.0) > 1e-3 * s[0]:
            cosines = np.linalg.svd(got.T @ wanted, compute_uv=False)
            assert 1 - cosines.min() < max(1e3 * tolerance, 1e-9)
    best = (found.u * found.s[:kept]) @ found.vt
    assert np.linalg.norm(matrix - best, 2) <= (s[kept] if kept < len(s) else 0.0) + tolerance * s[0] * 10
    assert found.energy == pytest.approx(float(np.sum(s**2)), rel=1e-12)
    assert found.discarded_energy == pytest.approx(float(np.sum(s[kept:] ** 2)), abs=1e-9 * found.energy)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stacked ranks of the stacks that took the safe path."""
    seen: list[int] = []

    def spy(stack: Stack, rank: int) -> tuple[Matrix, Matrix, Matrix]:
        seen.append(stack.rank)
        return safe_svd(stack, rank)

    monkeypatch.setattr(decompose_module, "safe_svd", spy)
    return seen


# --- the choice -----------------------------------------------------------------------------------


def test_the_dense_sum_pays_where_it_takes_fewer_operations() -> None:
    """Square, R = x·d: 2x² + 3.3x³ against 2x + 1, equal at x = 0.748; a wide module gains by it later."""
    assert not decompose_module.dense_pays((4096, 4096), 3050)
    assert decompose_module.dense_pays((4096, 4096), 3080)
    assert not decompose_module.dense_pays((4096, 11008), 4000)
    assert decompose_module.dense_pays((4096, 11008), 4096)
    assert decompose_module.dense_pays((11008, 4096), 4096)


# --- the stack ------------------------------------------------------------------------------------


@given(addends(), st.sampled_from([1, 3, 7, 1024]), seeds)
@settings(max_examples=50)
def test_a_stack_is_the_product_of_its_whole_matrices(weighted: Weighted, block: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_module, "BLOCK", block)
        stack = Stack(weighted)
        b = np.concatenate([f.b.astype(np.float64) for _, f in weighted], axis=1)
        a = np.concatenate([f.a.astype(np.float64) for _, f in weighted], axis=0)
        w = np.concatenate([np.full(f.rank, weight) for weight, f in weighted])
        rng = np.random.default_rng(seed)
        x, g = rng.standard_normal((len(w), 3)), rng.standard_normal((3, 2))
        u, b_seen = stack.left(x, g)
        vt, a_seen = stack.right(x, g)
        for got, wanted in (
            (stack.b(), b * w),
            (stack.a(), a),
            (stack.gram_b(), b.T @ b),
            (stack.gram_a(), a @ a.T),
            (u, b @ x),
            (b_seen, b.T @ (b @ x @ g)),
            (vt, x.T @ a),
            (a_seen, a @ (a.T @ x @ g)),
            (stack.left_transposed(u), b.T @ u),
            (stack.product(), dense(weighted)),
            (stack.transposed().product(), dense(weighted).T),
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-9 * max(1.0, np.abs(wanted).max()))


def test_a_stack_of_no_components_is_the_zero_update() -> None:
    stack = Stack([(1.0, LoraFactors.empty(5, 4))])
    assert stack.rank == 0
    assert not stack.product().any()
    found = decompose(stack, 3)
    assert (found.u.shape, found.vt.shape, found.energy) == ((5, 0), (0, 4), 0.0)


# --- each decomposition against the naive one -----------------------------------------------------


@pytest.mark.parametrize("path", [safe, gram_svd, dense_svd], ids=lambda p: p.__name__)
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (64, 64)], ids=str)
@pytest.mark.parametrize("kept", [1, 12, 40])
def test_leading_triplets(path: Path, shape: tuple[int, int], kept: int) -> None:
    weighted = falling(*shape, [4, 4, 10, 10, 20])
    found = path(Stack(weighted), kept)
    assert found is not None
    assert found.error < 1e-8
    assert_leading(found, weighted)


@pytest.mark.parametrize("path", [safe, gram_svd], ids=lambda p: p.__name__)
def test_all_components_of_a_stack(path: Path) -> None:
    weighted = falling(60, 50, [3, 9])
    found = path(Stack(weighted), 12)
    assert found is not None
    assert found.discarded_energy == 0
    assert_leading(found, weighted)


@pytest.mark.parametrize("path", [gram_svd, dense_svd], ids=lambda p: p.__name__)
def test_by_hand(path: Path) -> None:
    """3/4·4·e1e1ᵀ + 1/4·8·e2e2ᵀ = diag(3, 2, 0): of 13, rank 1 drops 4."""
    first = LoraFactors(np.array([[4.0], [0.0], [0.0]]), np.array([[1.0, 0.0, 0.0]]))
    second = LoraFactors(np.array([[0.0], [8.0], [0.0]]), np.array([[0.0, 1.0, 0.0]]))
    found = path(Stack([(0.75, first), (0.25, second)]), 1)
    assert found is not None
    np.testing.assert_allclose(found.s[:2], [3, 2])
    np.testing.assert_allclose((found.u * found.s[:1]) @ found.vt, np.diag([3.0, 0, 0]), atol=1e-12)
    assert (found.energy, found.discarded_energy) == (pytest.approx(13), pytest.approx(4))


@given(addends(), st.data())
def test_whatever_is_chosen_agrees_with_the_naive_svd(weighted: Weighted, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(weighted[0][1].shape)), label="rank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose_module, "FAST_FROM", 1)
        found = decompose(Stack(weighted), rank)
    size = sum(abs(w) * f.norm() for w, f in weighted)
    matrix = dense(weighted)
    s = np.linalg.svd(matrix, compute_uv=False)
    kept = found.u.shape[1]
    assert kept == min(rank, sum(f.rank for _, f in weighted), *matrix.shape)
    np.testing.assert_allclose(found.s[:kept], s[:kept], rtol=0, atol=1e-6 * max(s[0], 1e-9 * size))
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(kept), atol=1e-6)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(kept), atol=1e-6)
    assert found.discarded_energy == pytest.approx(float(np.sum(s[kept:] ** 2)), abs=1e-9 * size**2)


def test_a_large_core_is_decomposed_only_as_far_as_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "TRUNCATED_FROM", 200)
    weighted = falling(420, 400, [200, 180], by=0.8)
    found = gram_svd(Stack(weighted), 5)
    assert found is not None
    assert len(found.s) == 5  # the other 375 were never computed
    assert found.error < 1e-6
    assert_leading(found, weighted, tolerance=1e-6)


def test_a_core_whose_kept_values_fall_far_gets_an_svd_of_its_own() -> None:
    """σ from 1 to 1e-6: V = Cᵀu/σ from the squared core would be orthonormal to 1e-4 only."""
    rng = np.random.default_rng(2)
    b = np.linalg.qr(rng.standard_normal((80, 20)))[0] * np.logspace(0, -6, 20)
    weighted = [(1.0, LoraFactors(b, np.linalg.qr(rng.standard_normal((70, 20)))[0].T))]
    found = gram_svd(Stack(weighted), 20)
    assert found is not None
    np.testing.assert_allclose(found.s, np.logspace(0, -6, 20), rtol=1e-9)
    assert found.error < 1e-12


@given(st.integers(1, 200), seeds)
@settings(max_examples=20)
def test_solve_upper(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.standard_normal((size, size))) / size + np.eye(size)
    right = rng.standard_normal((size, 3))
    np.testing.assert_allclose(upper @ solve_upper(upper, right), right, atol=1e-9 * np.abs(right).max())


# --- the iteration --------------------------------------------------------------------------------


def test_leading_eigenpairs_of_a_falling_spectrum() -> None:
    rng = np.random.default_rng(0)
    values = 0.8 ** np.arange(200)
    vectors = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    matrix = (vectors * values) @ vectors.T
    found = leading_eigenpairs(lambda x: matrix @ x, 200, 4, 1e-9)
    assert found is not None
    np.testing.assert_allclose(found[0], values[:4], rtol=1e-12)
    np.testing.assert_allclose(np.abs(vectors[:, :4].T @ found[1]), np.eye(4), atol=1e-7)


def test_a_flat_spectrum_is_given_up_early() -> None:
    applied = []
    values = np.linspace(1.0, 0.0, 4000)

    def apply(x: Matrix) -> Matrix:
        applied.append(x.shape[1])
        return values[:, None] * x

    assert leading_eigenpairs(apply, 4000, 4, 1e-9) is None
    assert len(applied) == 6


def test_a_matrix_of_less_rank_than_wanted_is_exact() -> None:
    """The basis spans the whole range after one step; what it grows by from then on is rounding."""
    b = np.random.default_rng(1).standard_normal((120, 3))
    found = leading_eigenpairs(lambda x: b @ (b.T @ x), 120, 6, 1e-9)
    assert found is not None
    np.testing.assert_allclose(found[0][:3], np.linalg.eigvalsh(b.T @ b)[::-1], rtol=1e-12)
    np.testing.assert_allclose(found[1].T @ found[1], np.eye(6), atol=1e-12)


# --- where a fast path is not exact ---------------------------------------------------------------


def test_ordinary_updates_stay_on_the_fast_path(calls: list[int]) -> None:
    weighted = falling(90, 70, [8, 8, 20])
    assert_leading(decompose(Stack(weighted), 16), weighted)
    assert calls == []


def test_dependent_updates_stay_on_the_fast_path(calls: list[int]) -> None:
    """The same update three times, and a change in the components of another: R = 48, rank 16."""
    first, second = (f for _, f in falling(90, 70, [8, 8]))
    weighted = [(0.2, first), (0.3, first), (0.5, second), (-0.1, first)]
    weighted += [(0.5, LoraFactors(second.b[:, ::-1], second.a[::-1])), (0.1, second)]
    assert_leading(decompose(Stack(weighted), 12), weighted)
    assert calls == []


def test_dependent_updates_with_fewer_components_than_kept_take_the_safe_path(calls: list[int]) -> None:
    ((_, only),) = falling(90, 70, [12])
    weighted = [(0.5, only), (0.5, only)]
    found = decompose(Stack(weighted), 20)
    assert calls == [24]
    assert found.u.shape == (90, 20)
    np.testing.assert_allclose(found.s[12:], 0, atol=1e-12)
    assert_leading(found, weighted)


def test_an_update_a_million_times_the_others(calls: list[int]) -> None:
    weighted = falling(90, 70, [8, 8, 8])
    huge = weighted[1][1]
    weighted[1] = (weighted[1][0], LoraFactors(huge.b * np.float32(1e6), huge.a))
    found = decompose(Stack(weighted), 8)
    assert_leading(found, weighted)
    assert calls == []
    # What the others say is 1e-6 of the whole, and kept here: from the safe path or as exact as there.
    assert_leading(decompose(Stack(weighted), 24), weighted)


def test_updates_that_cancel_but_for_a_trace_take_the_safe_path(calls: list[int]) -> None:
    """b·a − (b + δ)·a with |δ| = 1e-9·|b|: a Gram matrix of the stack holds δ² = 1e-18 as rounding."""
    rng = np.random.default_rng(3)
    b, a, delta = rng.standard_normal((90, 8)), rng.standard_normal((8, 70)), rng.standard_normal((90, 8))
    weighted = [(1.0, LoraFactors(b, a)), (-1.0, LoraFactors(b + 1e-9 * delta, a))]
    found = decompose(Stack(weighted), 4)
    assert calls == [16]
    s = np.linalg.svd(delta @ a, compute_uv=False) * 1e-9
    np.testing.assert_allclose(found.s[:4], s[:4], rtol=1e-5)


def test_updates_that_cancel_exactly(calls: list[int]) -> None:
    ((_, only),) = falling(90, 70, [12])
    found = decompose(Stack([(1.0, only), (-1.0, only)]), 8)
    assert calls == [24]
    assert found.energy <= 1e-24 * only.norm() ** 2
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(8), atol=1e-12)


@pytest.mark.parametrize("zero", ["b", "a", "weight"])
def test_nothing_learnt_is_nothing_combined(zero: str, calls: list[int]) -> None:
    weighted = [(0.0 if zero == "weight" else 1.0, f) for _, f in falling(90, 70, [10, 10])]
    for _, f in weighted:
        if zero != "weight":
            getattr(f, zero)[:] = 0
    found = decompose(Stack(weighted), 8)
    assert calls == [20]
    assert (found.energy, found.discarded_energy) == (0.0, 0.0)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(8), atol=1e-12)


def test_components_without_a_gradient_yet_drop_out(calls: list[int]) -> None:
    """A fresh LoRA component has b = 0: its column has no direction."""
    weighted = falling(90, 70, [10, 10])
    weighted[0][1].b[:, 5:] = 0
    weighted[1][1].a[7:] = 0
    assert_leading(decompose(Stack(weighted), 8), weighted)
    assert calls == []


@pytest.mark.parametrize("half", ["gram_b", "gram_a"])
def test_a_wrong_gram_matrix_is_noticed(half: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is compared with the updates themselves and not with what it was made from."""
    right = getattr(Stack, half)

    def wrong(self: Stack) -> Matrix:
        gram = right(self)
        gram[3, 3] *= 1.001
        return gram  # type: ignore[no-any-return]

    monkeypatch.setattr(Stack, half, wrong)
    weighted = falling(90, 70, [8, 8, 20])
    assert_leading(decompose(Stack(weighted), 16), weighted)
    assert calls == [36]


def test_the_dense_path_notices_and_gives_up_too(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose_module, "dense_pays", lambda shape, rank: True)
    weighted = falling(90, 70, [40, 40])
    assert_leading(decompose(Stack(weighted), 8), weighted)
    assert calls == []
    fallen = [(1.0, LoraFactors(f.b * 1e-3 ** np.arange(f.rank), f.a)) for _, f in falling(60, 50, [20])]
    found = decompose(Stack(fallen), 20)  # σ down to 1e-57: nothing of that is left in P Pᵀ
    assert calls == [20]
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(20), atol=1e-12)


def test_squares_that_overflow_take_the_safe_path(calls: list[int]) -> None:
    """Columns of 1e170 times rows of 1e-170: an ordinary product."""
    rng = np.random.default_rng(4)
    f = LoraFactors(rng.standard_normal((40, 16)) * 1e170, rng.standard_normal((16, 30)) * 1e-170)
    found = decompose(Stack([(1.0, f)]), 4)
    assert calls == [16]
    assert np.isfinite(found.u).all()


@pytest.mark.parametrize("path", [safe, gram_svd, dense_svd], ids=lambda p: p.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["weight", "b", "a"])
def test_values_that_are_not_finite_are_refused_on_every_path(path: Path, value: float, where: str) -> None:
    weighted = falling(40, 30, [10, 10])
    if where == "weight":
        weighted[1] = (value, weighted[1][1])
    else:
        getattr(weighted[1][1], where)[0, 3] = value
    with pytest.raises(AdapterError, match="not finite"), np.errstate(invalid="ignore"):
        path(Stack(weighted), 4)


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[8, 8, 20], [40, 40, 20]], ids=["gram", "dense"])
def test_the_same_updates_give_the_same_bytes(ranks: list[int]) -> None:
    def made() -> bytes:
        got = combine(falling(90, 70, ranks), 16)
        return got.factors.b.tobytes() + got.factors.a.tobytes() + got.singular_values.tobytes()

    assert made() == made()
