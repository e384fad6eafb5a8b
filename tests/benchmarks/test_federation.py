"""The federation in one process: who takes part, who is stale, and what each version is made of."""

from __future__ import annotations

import numpy as np

from benchmarks.common.federation import (
    Turn,
    Update,
    drawn,
    grown,
    half_stale,
    merged,
    staleness_weights,
)
from coordinator.rules.named import rule_named
from edge_sdk.core.lora import LoraFactors
from tests.edge_sdk.core.draws import factors


def test_devices_of_a_version_are_drawn_by_seed_and_version() -> None:
    assert drawn(6, 4, 0, 1) == drawn(6, 4, 0, 1) != drawn(6, 4, 0, 2)
    assert len(set(drawn(6, 4, 0, 1))) == 4


def test_every_second_device_is_one_version_late_but_never_before_the_first() -> None:
    assert half_stale([5, 3, 4], 2) == [Turn(2, 2, 5), Turn(2, 1, 3), Turn(2, 2, 4)]
    assert [turn.begin for turn in half_stale([5, 3], 0)] == [0, 0]


def test_versions_follow_from_what_is_trained_on_those_before() -> None:
    history = [1]
    steps = grown(
        history,
        3,
        lambda version: half_stale([10, 20], version),
        lambda turn: history[turn.begin] * turn.device,
        sum,
    )
    assert list(steps) == [(1, 30), (2, 320), (3, 3800)]  # 2: 30·10 + 1·20; 3: 320·10 + 30·20
    assert history == [1, 30, 320, 3800]
    assert list(grown(history, 3, lambda _: [], lambda _: 0, sum)) == []


def test_weights_sum_to_one_and_fall_with_staleness() -> None:
    fresh, stale = staleness_weights(half_stale([0, 1], 5))
    assert fresh + stale == 1.0
    assert stale / fresh == 2**-0.5


def test_a_version_is_the_rules_own_sum() -> None:
    draw = np.random.default_rng(0)
    history = [{"w": LoraFactors.empty(12, 8)}]
    changes = [{"w": factors(draw, 12, 8, 2)} for _ in range(2)]
    turns = [Turn(0, 0, device) for device in range(2)]
    for number in (1, 2):
        updates = [Update(turn, change) for turn, change in zip(turns, changes, strict=True)]
        newest, discarded = merged(rule_named("carry"), history, updates)
        expected = number * sum(0.5 * change["w"].product() for change in changes)
        np.testing.assert_allclose(newest["w"].product(), expected, atol=1e-5)
        assert discarded < 1e-9
        history.append(dict(newest))
        turns = [Turn(number, number, device) for device in range(2)]


def test_a_rule_gets_the_starts_that_it_asks_for() -> None:
    draw = np.random.default_rng(0)
    start = factors(draw, 12, 8, 2)
    first, _ = merged(
        rule_named("innovation"), [{"w": LoraFactors.empty(12, 8)}], [Update(Turn(0, 0, 0), {"w": start})]
    )
    unchanged = Update(Turn(1, 1, 0), first)
    second, _ = merged(rule_named("innovation"), [{"w": LoraFactors.empty(12, 8)}, first], [unchanged])
    np.testing.assert_allclose(second["w"].product(), first["w"].product(), atol=1e-5)
