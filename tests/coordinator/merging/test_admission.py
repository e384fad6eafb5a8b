"""The norm of a change and the bound on it: by hand, against dense matrices, against those who push it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.merging.admission import MAX_NORM, Admission, Norms, admit, bound, measure
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.lora import LoraFactors, stacked
from tests.edge_sdk.core.draws import factors, seeds

OUT, IN = 9, 7


def adapter(seed: int, rank: int, scale: float = 1.0) -> dict[str, LoraFactors]:
    rng = np.random.default_rng(seed)
    return {name: factors(rng, OUT, IN, rank, scale) for name in ("up", "down")}


def less(end: LoraFactors, start: LoraFactors) -> LoraFactors:
    return stacked([(1.0, end), (-1.0, start)])


# --- norms ----------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 7), st.integers(0, 7))
def test_the_norm_of_a_change_is_the_dense_one(seed: int, end_rank: int, start_rank: int) -> None:
    end, start = adapter(seed, end_rank), adapter(seed + 1, start_rank)
    found = measure((name, less(end[name], start[name])) for name in end)
    dense = [end[name].product() - start[name].product() for name in end]
    for name, change in zip(end, dense, strict=True):
        assert found.modules[name] == pytest.approx(np.linalg.norm(change), rel=1e-4, abs=1e-4)
    assert found.total == pytest.approx(np.linalg.norm(dense), rel=1e-4, abs=1e-4)


def test_the_split_between_the_factors_changes_nothing() -> None:
    plain = adapter(0, 3)
    skewed = {name: LoraFactors(f.b * 1e6, f.a / 1e6) for name, f in plain.items()}
    assert measure(skewed.items()).total == pytest.approx(measure(plain.items()).total, rel=1e-5)


def test_a_state_that_did_not_change_has_no_norm_however_large_it_is() -> None:
    state = adapter(0, 3, scale=1e3)
    same = {name: less(f, LoraFactors(2 * f.b, f.a / 2)) for name, f in state.items()}
    assert measure(same.items()).total < 1e-3 < 1e3 < measure(state.items()).total


@pytest.mark.parametrize("scale", [2 * MAX_NORM, 1e30])
def test_a_module_beyond_all_measure_is_named(scale: float) -> None:
    huge = adapter(0, 1) | {"up": LoraFactors(np.full((OUT, 1), scale), np.eye(1, IN))}
    with pytest.raises(AdapterError, match=r"module up has norm .* above 1e\+06"):
        measure(huge.items())


def test_components_that_cancel_are_refused_by_their_own_size() -> None:
    """Their product is small; what is left of them in a sum is rounding, and averaged alone they are huge."""
    column, row = np.ones((OUT, 1)), np.ones((1, IN))
    for size in (1e7, 1e31):
        cancelling = LoraFactors(np.hstack([size * column, -size * column]), np.vstack([row, row]))
        assert cancelling.norm() == 0.0
        with pytest.raises(AdapterError, match=r"module up has (components|norm) .*above 1e\+06"):
            measure([("up", cancelling)])


# --- the bound ------------------------------------------------------------------------------------


def test_there_is_no_bound_before_enough_devices_are_known() -> None:
    assert bound([1.0] * 3, Admission()) is None
    assert bound([1.0] * 4, Admission()) == 5.0


def test_the_bound_by_hand() -> None:
    choices = Admission(norm_factor=3.0, history_least=1)
    assert bound([1.0, 2.0, 9.0], choices) == 6.0
    assert bound([1.0, 2.0], choices) == 3.0  # the lower of two
    assert bound([0.0, 0.0, 1.0], choices) == 3.0
    assert bound([0.5, 0.5, 1.0], choices, tiny=0.5) == 3.0
    assert bound([0.5, 0.5], choices, tiny=0.5) is None


def test_zeros_do_not_take_the_bound_away() -> None:
    """Four of eight devices that send zeros made the median 0, and the bound none."""
    assert bound([0.0] * 4 + [1.0] * 4, Admission()) == 5.0
    assert bound([0.0] * 4 + [1.0] * 3, Admission()) is None  # zeros are no history either


@given(
    honest=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=12),
    steps=st.integers(1, 60),
    data=st.data(),
)
def test_half_of_the_devices_cannot_raise_it(honest: list[float], steps: int, data: st.DataObject) -> None:
    """They hand in just what the bound lets through, as often as they like; the honest stay as they are."""
    choices = Admission(history_least=2)
    attackers = data.draw(st.integers(1, len(honest)))
    latest = {f"honest {k}": norm for k, norm in enumerate(honest)}
    for step in range(steps):
        limit = bound(list(latest.values()), choices)
        assert limit is not None
        assert limit <= 5.0 * max(honest)
        latest[f"attacker {step % attackers}"] = limit


@given(honest=st.lists(st.floats(0.5, 2.0), min_size=3, max_size=12), data=st.data())
def test_fewer_than_half_cannot_lower_it_either(honest: list[float], data: st.DataObject) -> None:
    choices = Admission(history_least=1)
    small = data.draw(st.lists(st.floats(0.0, 0.4), max_size=len(honest) - 1))
    limit = bound([*honest, *small], choices)
    assert limit is not None
    assert limit >= 5.0 * min(honest)


def test_where_everybody_grows_the_bound_follows() -> None:
    """All send 100 times as much from one day on: clipped at first, let through whole in the end."""
    choices, latest = Admission(), dict.fromkeys(range(5), 1.0)
    for step in range(50):
        limit = bound(list(latest.values()), choices)
        assert limit is not None
        latest[step % 5] = min(100.0, limit)
    assert min(latest.values()) == 100.0


# --- admission ------------------------------------------------------------------------------------

NORMS = Norms({"up": 3.0, "down": 4.0})


def test_what_is_within_the_bound_counts_whole() -> None:
    assert NORMS.total == 5.0
    for limit in (None, 5.0, 100.0):
        assert admit(NORMS, limit, refuse=True) == 1.0


def test_what_is_above_is_brought_down_to_it() -> None:
    assert admit(NORMS, 2.0, refuse=False) == pytest.approx(0.4)


def test_or_refused_with_norm_bound_and_module() -> None:
    with pytest.raises(AdapterError, match=r"by 5 .*above the 2 .*module down alone by 4") as refusal:
        admit(NORMS, 2.0, refuse=True)
    assert refusal.value.status == 422


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("norm_factor", 0.5),
        ("norm_factor", math.nan),
        ("norm_factor", math.inf),
        ("history_least", 0),
        ("history", 3),
        ("daily_factor", 0.9),
        ("reach_factor", math.inf),
        ("trimmed_share", 0.0),
        ("trimmed_share", 1.0),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"admission.{setting}"):
        Admission(**{setting: value})
