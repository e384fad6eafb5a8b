"""The rules that average factors themselves: FedIT and HETLoRA."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging
from edge_sdk.core.lora import LoraFactors
from tests.coordinator.rules.merges import IN, NOTHING, OUT, close, drawn
from tests.edge_sdk.core.draws import factors, seeds

AVERAGES: tuple[str, ...] = ("fedit", "hetlora")
ranks = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def padded(f: LoraFactors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    b, a = np.zeros((OUT, rank)), np.zeros((rank, IN))
    b[:, : f.rank], a[: f.rank] = f.b, f.a
    return b, a


@pytest.mark.parametrize("rule", AVERAGES)
@given(seed=seeds, ranks=ranks, eta=st.sampled_from([0.5, 1.0]))
def test_it_is_the_naive_average_of_zero_padded_factors(
    rule: str, seed: int, ranks: list[int], eta: float
) -> None:
    changes, current = drawn(seed, ranks), factors(np.random.default_rng(seed + 1), OUT, IN, 3)
    shares = np.array([c.weight for c in changes])
    if rule == "hetlora":
        shares *= [np.linalg.norm(c.factors.product().astype(np.float64)) for c in changes]
        shares /= shares.sum()
    found = rule_named(rule).next(Merging(current, changes, 1, eta=eta), 7).factors
    parts = [padded(c.factors, found.rank) for c in changes]
    old_b, old_a = padded(current.leading(found.rank), found.rank)
    b = eta * sum(w * p for w, (p, _) in zip(shares, parts, strict=True)) + (1 - eta) * old_b
    a = eta * sum(w * p for w, (_, p) in zip(shares, parts, strict=True)) + (1 - eta) * old_a
    close(found.b, np.asarray(b))
    close(found.a, np.asarray(a))


def test_averages_of_factors_hold_what_nobody_trained() -> None:
    """Of diag(1, 0) and diag(0, 1), the mean of B times the mean of A is 1/4 everywhere."""
    one = LoraFactors(np.array([[1.0], [0.0]]), np.array([[1.0, 0.0]]))
    two = LoraFactors(np.array([[0.0], [1.0]]), np.array([[0.0, 1.0]]))
    result = rule_named("fedit").next(
        Merging(LoraFactors.empty(2, 2), [Change(0.5, one), Change(0.5, two)]), 2
    )
    np.testing.assert_allclose(result.factors.product(), [[0.25, 0.25], [0.25, 0.25]])
    assert result.energy == pytest.approx(0.25)


def test_norms_outweigh_the_zeros_of_narrow_devices() -> None:
    """Nine devices of rank 1, and one of rank 2 that learnt much more and keeps its second component."""
    narrow = LoraFactors(np.array([[0.1], [0.0]]), np.array([[1.0, 0.0]]))
    wide = LoraFactors(np.diag([8.0, 8.0]), np.eye(2))
    changes = [*(Change(0.1, narrow) for _ in range(9)), Change(0.1, wide)]
    merging = Merging(LoraFactors.empty(2, 2), changes)
    kept = {rule: rule_named(rule).next(merging, 2).factors.product()[1, 1] for rule in AVERAGES}
    assert kept["fedit"] == pytest.approx(0.1 * 8 * 0.1)
    share = 8 * np.sqrt(2) / (8 * np.sqrt(2) + 9 * 0.1)
    assert kept["hetlora"] == pytest.approx(share * 8 * share)


@pytest.mark.parametrize("rule", AVERAGES)
def test_updates_that_are_all_zero_merge_to_zero(rule: str) -> None:
    still = LoraFactors(np.zeros((OUT, 2)), np.ones((2, IN)))
    result = rule_named(rule).next(Merging(NOTHING, [Change(0.5, still), Change(0.5, still)]), 7)
    assert not result.factors.product().any()
    assert result.energy == 0.0


@pytest.mark.parametrize("rule", AVERAGES)
@given(seed=seeds, rank=st.integers(1, 7))
def test_a_device_is_given_the_first_components_in_their_places(rule: str, seed: int, rank: int) -> None:
    """No order by size and no other split: what was averaged together stays together."""
    stored = factors(np.random.default_rng(seed), OUT, IN, 4)
    served = rule_named(rule).serve(stored, rank, "balanced", "seed")
    assert served.rank == rank
    np.testing.assert_array_equal(served.b[:, :4], stored.b[:, :rank])
    np.testing.assert_array_equal(served.a[:4], stored.a[:rank])
    assert not served.b[:, 4:].any()
    assert served.a[4:].any(axis=1).all()  # fresh rows, so that they can learn


@pytest.mark.parametrize("rule", AVERAGES)
def test_version_0_gives_all_devices_one_a(rule: str) -> None:
    first = rule_named(rule).serve(NOTHING, 2, "balanced", "f/0/m")
    wider = rule_named(rule).serve(NOTHING, 4, "balanced", "f/0/m")
    np.testing.assert_array_equal(first.a, wider.a[:2])
