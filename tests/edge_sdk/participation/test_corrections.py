"""Corrections of memory predictions: what a failure proves, what a success teaches, and that trying ends."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.participation.corrections import FAILURE_MARGIN, HIGHEST, LOWEST, Correction, Corrections

sizes = st.integers(1 << 20, 1 << 40)
factors = st.floats(LOWEST, HIGHEST)


def test_a_failure_proves_at_least_the_budget() -> None:
    """Predicted 4 GB, budget 6 GB, and yet it failed: the true peak is at least 1.5 times the prediction."""
    found = Correction().after_failure(4_000, 6_000)
    assert math.isclose(found.factor, 1.5 * 1.1)
    assert found.apply(4_000) == 6_600
    again = found.after_failure(3_000, 6_000)  # a smaller one failed too: 2.0 is proved
    assert math.isclose(again.factor, 2.2)


def test_a_success_teaches_slowly_downwards_and_at_once_upwards() -> None:
    assert math.isclose(Correction().after_success(1000, 800).factor, 0.95)
    assert math.isclose(Correction().after_success(1000, 1200).factor, 1.2)


def test_a_failure_is_not_forgotten_by_a_small_success() -> None:
    failed = Correction().after_failure(1000, 1000)
    after = failed
    for _ in range(3):
        after = after.after_success(500, 450)
    assert after.apply(1000) > 1000  # the setting that failed still does not fit
    for _ in range(2000):
        after = after.after_success(500, 450)
    assert after.apply(1000) <= 1001  # the day may come when it is tried again


@given(factors, sizes, sizes)
def test_what_failed_no_longer_fits(factor: float, predicted: int, budget: int) -> None:
    after = Correction(factor).after_failure(predicted, budget)
    assert after.apply(predicted) > budget or after.exhausted
    assert after.factor >= factor


@given(factors, st.floats(0.1, 4.0), sizes, st.integers(1, 60))
def test_successes_lead_to_the_truth(factor: float, truth: float, predicted: int, runs: int) -> None:
    """Without failures the distance to measured / predicted never grows."""
    correction, true = Correction(factor), min(HIGHEST, max(LOWEST, truth))
    for _ in range(runs):
        before = correction.factor
        correction = correction.after_success(predicted, round(truth * predicted))
        assert abs(correction.factor - true) <= abs(before - true) + 1e-3
        assert correction.factor >= true - 1e-3


@given(
    st.lists(sizes, min_size=1, max_size=12, unique=True),
    st.floats(0.2, 20.0),
    sizes,
    factors,
)
def test_trying_ends_with_a_setting_that_works_or_a_clean_no(
    predictions: list[int], truth: float, budget: int, factor: float
) -> None:
    """The true peaks are `truth` times the predictions; the chooser takes the largest setting that fits."""
    correction, tried = Correction(factor), []
    while True:
        fitting = [p for p in predictions if correction.apply(p) <= budget]
        if not fitting or correction.exhausted:
            break
        chosen = max(fitting)
        tried.append(chosen)
        if chosen * truth <= budget:
            correction = correction.after_success(chosen, round(chosen * truth))
            break
        correction = correction.after_failure(chosen, budget)
    assert tried == sorted(
        set(tried), reverse=True
    )  # each try is smaller than the one before: no oscillation
    assert len(tried) <= math.log(HIGHEST / LOWEST) / math.log(FAILURE_MARGIN) + 1


@given(st.floats(1.0, 3.0), sizes, st.integers(1, 30))
def test_after_it_has_settled_a_failing_setting_is_not_retried_at_once(
    truth: float, budget: int, runs: int
) -> None:
    """Success at half the size does not bring the failing one back for as long as easing takes."""
    large, small = budget, budget // 2
    correction = Correction().after_failure(large, budget)
    fails_at = [correction.apply(large) > budget]
    for _ in range(min(runs, 5)):
        correction = correction.after_success(small, round(small * min(truth, 2.0)))
        fails_at.append(correction.apply(large) > budget)
    assert all(fails_at)


def test_what_was_learnt_survives_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "memory.json"
    learnt = Correction().after_failure(1000, 1200).after_success(700, 800)
    Corrections(path).keep("ab12", "cpu", "bfloat16", learnt)
    Corrections(path).keep("ab12", "cuda", "bfloat16", Correction(0.9))
    assert Corrections(path).of("ab12", "cpu", "bfloat16") == learnt
    assert Corrections(path).of("ab12", "cuda", "bfloat16") == Correction(0.9)
    assert Corrections(path).of("ab12", "cpu", "float32") == Correction()
    path.write_text('{"corrections": {"x": {"factor": "much"}}}')
    with caplog.at_level(logging.WARNING):
        assert Corrections(path).of("x", "cpu", "float32") == Correction()
    assert "memory.json cannot be read" in caplog.text
