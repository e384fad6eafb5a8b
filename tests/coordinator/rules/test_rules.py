"""The rules that sum products, against the dense matrices that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging, Ranks
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import CARRYING, OWN_RULES
from tests.coordinator.rules.merges import (
    CAP,
    IN,
    NOTHING,
    OUT,
    canonical,
    close,
    drawn,
    from_versions,
    merged,
    product,
    starts_of,
    total,
    truncated,
)
from tests.edge_sdk.core.draws import factors, seeds

SUMS: tuple[str, ...] = ("flexlora", "innovation", "carry", "flora")
ALL: tuple[str, ...] = OWN_RULES

ranks = st.lists(st.integers(1, 7), min_size=1, max_size=4)
etas = st.sampled_from([0.25, 0.5, 1.0, 1.5])


def test_a_device_knows_which_rules_carry() -> None:
    assert {
        name for name, rule in {name: rule_named(name) for name in ALL}.items() if rule.carries
    } == CARRYING


@given(seeds, ranks, etas)
def test_flexlora_is_the_dense_average_and_eta_keeps_the_rest_of_the_old(
    seed: int, ranks: list[int], eta: float
) -> None:
    changes, current = drawn(seed, ranks), canonical(seed + 1, 5)
    expected = (1 - eta) * product(current) + eta * total(changes)
    scale = float(np.linalg.norm(product(current), 2) + np.linalg.norm(total(changes), 2))
    close(merged("flexlora", Merging(current, changes, 3, eta=eta)), expected, scale)


@pytest.mark.parametrize("rule", ["carry", "flora"])
@given(seed=seeds, ranks=ranks, eta=etas)
def test_changes_are_added_to_the_global_adapter(rule: str, seed: int, ranks: list[int], eta: float) -> None:
    changes, current = drawn(seed, ranks), canonical(seed + 1, 5)
    close(merged(rule, Merging(current, changes, 3, eta=eta)), product(current) + eta * total(changes))


@given(seeds, ranks, etas, st.data())
def test_innovation_is_the_dense_sum_of_what_was_changed(
    seed: int, ranks: list[int], eta: float, data: st.DataObject
) -> None:
    """G ← G + η Σ w (B̃A − T_r(G_v)), from the newest version, older ones, and version 0."""
    versions = {0: NOTHING, 1: canonical(seed + 1, 3), 2: canonical(seed + 2, 5), 3: canonical(seed + 3, 6)}
    begun = data.draw(st.lists(st.integers(0, 3), min_size=len(ranks), max_size=len(ranks)))
    changes = from_versions(drawn(seed, ranks), begun)
    merging = Merging(versions[3], changes, 3, starts_of(versions, changes), eta)
    expected, scale = product(versions[3]), 1.0
    for change in changes:
        start = truncated(versions[change.version], change.factors.rank) if change.version else 0.0
        expected = expected + eta * change.weight * (product(change.factors) - start)
        scale += float(np.linalg.norm(product(change.factors), 2))
    close(merged("innovation", merging), expected, scale)


@given(seeds, st.lists(st.integers(4, 7), min_size=1, max_size=4))
def test_innovation_of_equal_versions_without_truncation_is_the_published_average(
    seed: int, ranks: list[int]
) -> None:
    current = canonical(seed + 1, 4)  # every rank is at least its
    changes = from_versions(drawn(seed, ranks), [2] * len(ranks))
    merging = Merging(current, changes, 2, {2: current})
    scale = float(np.linalg.norm(product(current), 2) + np.linalg.norm(total(changes), 2))
    close(merged("innovation", merging), merged("flexlora", merging), scale)


@given(seeds, st.integers(1, 7), etas)
def test_a_device_that_changed_nothing_changes_nothing(seed: int, rank: int, eta: float) -> None:
    current = canonical(seed, 5)
    change = Change(1.0, current.leading(rank), 2)
    close(merged("innovation", Merging(current, [change], 2, {2: current}, eta)), product(current))


@given(seeds, st.integers(1, 9), st.integers(1, 3))
def test_the_stack_grows_by_a_block_for_each_version_not_for_each_device(
    seed: int, devices: int, versions: int
) -> None:
    """Innovation: r_k, G, and each older start once. Carry: likewise those that were not seen whole."""
    begun = [place % versions for place in range(devices)]  # 0 is the current one here: see below
    changes = [Change(1 / devices, factors(np.random.default_rng(seed), OUT, IN, 2), 9 - v) for v in begun]
    starts = {version: canonical(version, 4) for version in {change.version for change in changes}}
    current = canonical(9, 4)
    merging = Merging(current, changes, 9, starts)
    older = len(starts) - 1  # version 9 is among them, for the first device starts there
    for name, blocks in (("innovation", older), ("carry", older + 1)):
        rule = rule_named(name)
        stacked = sum(f.rank for _, f in rule.addends(merging))  # type: ignore[attr-defined]
        assert stacked == 2 * devices + 4 + 4 * blocks
        assert rule.stored_rank(merging.ranks(), (99, 99), 99, 1.0) == min(99, stacked)


@pytest.mark.parametrize("rule", ALL)
@given(seed=seeds, ranks=ranks, old=st.integers(0, 5), cap=st.integers(1, 7), eta=etas)
def test_the_file_can_announce_the_rank_before_the_factors_come(
    rule: str, seed: int, ranks: list[int], old: int, cap: int, eta: float
) -> None:
    current = canonical(seed, old) if old else NOTHING
    starts = {3: current} if old else {}
    merging = Merging(current, from_versions(drawn(seed, ranks), [3] * len(ranks)), 3, starts, eta)
    announced = rule_named(rule).stored_rank(merging.ranks(), (OUT, IN), cap, eta)
    assert rule_named(rule).merge(merging, announced).factors.rank == announced
    assert rule not in ("flexlora", "innovation", "carry") or announced <= cap


@pytest.mark.parametrize("rule", SUMS)
@given(seed=seeds, ranks=ranks, eta=st.sampled_from([0.5, 1.0]))
def test_version_0_counts_as_zero(rule: str, seed: int, ranks: list[int], eta: float) -> None:
    changes = drawn(seed, ranks)
    close(merged(rule, Merging(NOTHING, changes, eta=eta)), eta * total(changes))


@pytest.mark.parametrize("rule", ALL)
@given(seed=seeds, rank=st.integers(1, 7), weights=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_equal_devices_give_that_devices_product(rule: str, seed: int, rank: int, weights: list[int]) -> None:
    same = factors(np.random.default_rng(seed), OUT, IN, rank)
    changes = [Change(weight / sum(weights), same) for weight in weights]
    close(merged(rule, Merging(NOTHING, changes)), product(same))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("flexlora", [[0.5, 0.0], [0.0, 6.0]]),
        (
            "innovation",
            [[0.5, 0.0], [0.0, 6.0]],
        ),  # as rank 1 holds all of the old
        ("carry", [[0.5, 1.0], [0.0, 6.0]]),
        ("flora", [[0.5, 1.0], [0.0, 6.0]]),
        ("fedit", [[0.125, 1.5], [0.375, 4.5]]),  # the products of the means: 0.25·0.5, 0.25·6, …
        ("hetlora", [[2 / 169, 96 / 169], [24 / 169, 1152 / 169]]),  # w‖·‖ = 0.5 and 6: shares 1/13 and 12/13
    ],
)
def test_numbers_by_hand(rule: str, expected: list[list[float]]) -> None:
    one = LoraFactors(np.array([[1.0], [0.0]]), np.array([[2.0, 0.0]]))  # [[2, 0], [0, 0]]
    two = LoraFactors(np.array([[0.0], [1.0]]), np.array([[0.0, 8.0]]))  # [[0, 0], [0, 8]]
    old = LoraFactors(np.array([[1.0], [0.0]]), np.array([[0.0, 1.0]]))  # [[0, 1], [0, 0]]
    changes = [Change(0.25, one, 1, 1), Change(0.75, two, 1, 1)]
    starts = {1: old} if rule == "innovation" else {}
    np.testing.assert_allclose(merged(rule, Merging(old, changes, 1, starts), 2), expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["flexlora", "innovation", "carry"])
def test_the_cap_keeps_the_largest_components_and_knows_what_it_dropped(rule: str) -> None:
    update = LoraFactors(np.diag([5.0, 3.0, 1.0]), np.eye(3))
    result = rule_named(rule).next(Merging(LoraFactors.empty(3, 3), [Change(1.0, update)]), 2)
    np.testing.assert_allclose(result.factors.product(), np.diag([5.0, 3.0, 0.0]), atol=1e-6)
    assert (result.rank, result.energy, result.discarded_energy) == pytest.approx((2, 35.0, 1.0))


def test_flora_truncates_nothing() -> None:
    update = LoraFactors(np.diag([5.0, 3.0, 1.0]), np.eye(3))
    result = rule_named("flora").next(Merging(LoraFactors.empty(3, 3), [Change(1.0, update)]), 2)
    np.testing.assert_allclose(result.factors.product(), np.diag([5.0, 3.0, 1.0]), atol=1e-6)
    assert result.discarded_energy == 0.0


def test_a_cap_above_the_module_is_the_modules_own() -> None:
    for rule in map(rule_named, ALL):
        assert rule.stored_rank(Ranks([2, 9]), (3, 5), 99, 1.0) <= 3


def test_what_rules_need_of_the_start() -> None:
    """An update of rank 4 that carried 3 of 5 live components."""
    needing = {
        name for name, rule in {name: rule_named(name) for name in ALL}.items() if rule.needs_start(4, 3, 5)
    }
    assert needing == {"innovation", "carry", "flora"}
    needing = {
        name for name, rule in {name: rule_named(name) for name in ALL}.items() if rule.needs_start(4, 5, 5)
    }
    assert needing == {"innovation"}


assert min(OUT, IN) == CAP  # the laws above compare without truncation
