"""How long a device may take and how much it is given: by hand, and as laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.engine import pacing
from coordinator.engine.policy import Policy

PACES = st.lists(st.floats(0.01, 1000.0), min_size=3, max_size=8)


def test_nobody_knows_what_is_usual_before_three_assignments() -> None:
    assert pacing.pace_limit_s([], 6.0) is None
    assert pacing.pace_limit_s([1.0, 2.0], 6.0) is None
    assert pacing.lease_s([1.0, 2.0], 100, Policy(lease_s=600.0)) == 600.0
    assert pacing.steps([1.0, 2.0], 100, Policy(work_s=1.0)) == 100


def test_the_limit_is_the_median_and_k_times_the_median_deviation() -> None:
    # Median 4; deviations 3, 1, 0, 1, 16: median 1. So 4 + 6·1.
    assert pacing.pace_limit_s([1.0, 3.0, 4.0, 5.0, 20.0], 6.0) == 10.0
    # Of an even count the middle two are averaged: median 3; deviations 2, 1, 1, 5: median 1.5.
    assert pacing.pace_limit_s([1.0, 2.0, 4.0, 8.0], 2.0) == 6.0


def test_equal_times_leave_a_tenth_of_themselves_as_spread() -> None:
    assert pacing.pace_limit_s([2.0, 2.0, 2.0], 5.0) == pytest.approx(2.0 + 5 * 0.2)


def test_a_deadline_is_for_all_its_steps_within_ten_seconds_and_the_hosts_lease() -> None:
    policy = Policy(lease_s=600.0, deadline_mads=5.0)
    assert pacing.lease_s([2.0, 2.0, 2.0], 100, policy) == pytest.approx(300.0)
    assert pacing.lease_s([2.0, 2.0, 2.0], 1, policy) == 10.0
    assert pacing.lease_s([2.0, 2.0, 2.0], 1000, policy) == 600.0
    assert pacing.lease_s([0.0, 0.0, 0.0], 50, policy) == 10.0
    assert pacing.lease_s([2.0, 2.0, 2.0], 1, Policy(lease_s=3.0)) == 3.0  # never above the host's


def test_sized_work_is_what_usually_fits() -> None:
    policy = Policy(work_s=60.0)
    assert pacing.steps([0.5, 0.5, 9.0], 100, policy) == 100  # 120 would fit; 100 are wanted
    assert pacing.steps([1.0, 2.0, 9.0], 100, policy) == 30
    assert pacing.steps([1.0, 7.0, 9.0], 100, policy) == 12  # 8 would fit: an eighth at least
    assert pacing.steps([1.0, 70.0, 90.0], 7, policy) == 1
    assert pacing.steps([0.0, 0.0, 0.0], 100, policy) == 100
    assert pacing.steps([1.0, 2.0, 9.0], 100, Policy()) == 100


@given(paces=PACES, outlier=st.floats(1e3, 1e9), mads=st.floats(0.5, 10.0))
def test_one_night_with_the_lid_closed_moves_a_deadline_no_further_than_its_neighbours(
    paces: list[float], outlier: float, mads: float
) -> None:
    """However long one took, the limit stays within what the others alone could give."""
    found = pacing.pace_limit_s([*paces, outlier], mads)
    assert found is not None
    assert found <= max(paces) + mads * max(max(paces) - min(paces), 0.1 * max(paces)) + 1e-9


@given(usual=st.floats(0.1, 100.0), outlier=st.floats(0.0, 1e9), mads=st.floats(0.5, 10.0))
def test_an_outlier_among_equals_changes_nothing(usual: float, outlier: float, mads: float) -> None:
    equals = [usual] * 4
    assert pacing.pace_limit_s([*equals, outlier], mads) == pacing.pace_limit_s(equals, mads)


@given(paces=PACES, mads=st.floats(0.1, 10.0), more=st.floats(0.0, 10.0))
def test_more_deviations_never_shorten_a_deadline(paces: list[float], mads: float, more: float) -> None:
    tight, loose = (pacing.pace_limit_s(paces, k) for k in (mads, mads + more))
    assert tight is not None
    assert loose is not None
    assert tight <= loose


@given(paces=PACES, times=st.floats(1.0, 50.0), steps=st.integers(1, 500))
def test_a_slower_device_gets_more_time_and_less_work(paces: list[float], times: float, steps: int) -> None:
    policy = Policy(lease_s=1e9, work_s=100.0)
    slower = [times * pace for pace in paces]
    assert pacing.lease_s(slower, steps, policy) >= pacing.lease_s(paces, steps, policy) - 1e-9
    assert pacing.steps(slower, steps, policy) <= pacing.steps(paces, steps, policy)


@given(paces=PACES, steps=st.integers(1, 500))
def test_most_of_what_a_device_did_before_was_in_time(paces: list[float], steps: int) -> None:
    """A device that goes on as before keeps its deadline at least every second time, with any k."""
    limit = pacing.lease_s(paces, steps, Policy(lease_s=1e12, deadline_mads=1e-6))
    assert sum(pace * steps <= limit * (1 + 1e-9) for pace in paces) * 2 >= len(paces)


@given(paces=PACES, steps=st.integers(1, 500), work_s=st.floats(0.1, 1e4))
def test_sized_work_is_between_an_eighth_and_all(paces: list[float], steps: int, work_s: float) -> None:
    found = pacing.steps(paces, steps, Policy(work_s=work_s))
    assert max(1, steps // 8) <= found <= steps
