"""The time of a step: its work by hand, laws, and constants found again from what they predict."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from edge_sdk.core.facts import ModelFacts
from edge_sdk.core.setting import Ranks, Setting
from edge_sdk.core.timing import StepTime, Work, fit, work

# Two blocks of one attention and one feed-forward matrix.
SHAPES = {f"h.{n}.{name}": shape for n in (0, 1) for name, shape in (("attn.p", (6, 6)), ("fc", (24, 6)))}
FACTS = ModelFacts(
    shapes=SHAPES,
    linear_parameters=2 * (36 + 144),
    other_parameters=100 * 6,
    hidden=6,
    layers=2,
    intermediate=24,
    heads=2,
    query_width=6,
    key_value_width=6,
    mlp_tensors=1,
    vocab=100,
)
KNOWN = StepTime(per_layer_s=0.002, per_frozen_gflop_s=0.05, per_factor_gflop_s=0.4)


def setting(rank: int, **changes: Any) -> Setting:
    return replace(Setting(Ranks.uniform(rank), 0, sequence_len=10, micro_batch=2), **changes)


def test_the_work_by_hand() -> None:
    done = work(FACTS, setting(3), batch=4)
    assert done.layer_passes == 2 * 2  # two micro-batches through two blocks
    linear, head = 2 * 2 * 360, 2 * 2 * 100 * 6  # forward, and the gradient of the input
    scores = 2 * 2 * 10 * 6 * 3.5
    assert done.frozen_operations == 40 * (linear + head + scores)
    factors = 2 * 3 * (12 + 30)
    assert done.factor_operations == 40 * 2 * 3 * factors  # and the gradient of the factor


def test_recomputation_is_the_forward_pass_again() -> None:
    plain, again = (work(FACTS, setting(3, checkpointing=on), batch=4) for on in (False, True))
    assert again.layer_passes == plain.layer_passes
    assert again.frozen_operations - plain.frozen_operations == 40 * (2 * 360 + 2 * 2 * 10 * 6)
    assert again.factor_operations == plain.factor_operations * 4 / 3


def test_carried_factors_have_no_gradient_of_their_own() -> None:
    bare, carrying = (work(FACTS, setting(3, carry_rank=rank), batch=4) for rank in (0, 3))
    assert carrying.factor_operations - bare.factor_operations == bare.factor_operations * 2 / 3
    assert carrying.frozen_operations == bare.frozen_operations


@pytest.mark.parametrize(("batch", "micro_batch", "passes"), [(8, 8, 1), (8, 3, 3), (1, 4, 1), (7, 1, 7)])
def test_micro_batches_are_counted_up(batch: int, micro_batch: int, passes: int) -> None:
    assert work(FACTS, setting(3, micro_batch=micro_batch), batch).layer_passes == 2 * passes


def test_seconds_by_hand() -> None:
    times = StepTime(0.5, 2.0, 3.0)
    done = work(FACTS, setting(3), batch=4)
    expected = 0.5 * 4 + 2e-9 * done.frozen_operations + 3e-9 * done.factor_operations
    assert times.step_s(FACTS, setting(3), batch=4) == pytest.approx(expected, rel=1e-12)


constants = st.floats(1e-6, 10)
sizes = st.integers(1, 32)


@given(st.builds(StepTime, constants, constants, constants), sizes, sizes, sizes, sizes, sizes, st.booleans())
def test_a_step_grows_with_all_that_it_does(
    times: StepTime, attention: int, mlp: int, length: int, micro: int, batch: int, again: bool
) -> None:
    at = Setting(Ranks(attention, mlp), 4, length, micro, again)

    def seconds(examples: int = batch, **changes: Any) -> float:
        return times.step_s(FACTS, replace(at, **changes), examples)

    base = seconds()
    assert seconds(ranks=Ranks(attention + 1, mlp)) >= base  # a module narrower than that is full
    assert seconds(ranks=Ranks(attention, mlp + 1)) >= base
    assert seconds(carry_rank=5) > base
    assert seconds(sequence_len=length + 1) > base
    assert seconds(examples=batch + 1) > base
    assert seconds(checkpointing=True) >= base
    assert seconds(micro_batch=max(1, micro // 2)) >= base


# --- the fit --------------------------------------------------------------------------------------


def measured(times: StepTime) -> list[tuple[Work, float]]:
    settings = [setting(1), setting(6), setting(3, micro_batch=1), setting(2, sequence_len=300)]
    return [(work(FACTS, at, 4), times.step_s(FACTS, at, 4)) for at in settings]


@pytest.mark.parametrize(
    "known", [KNOWN, StepTime(0.0, 0.05, 0.4), StepTime(0.002, 0.0, 0.4), StepTime(0.002, 0.05, 0.0)]
)
def test_known_constants_are_found_again(known: StepTime) -> None:
    found = fit(measured(known))
    assert found.per_layer_s == pytest.approx(known.per_layer_s, rel=1e-6, abs=1e-12)
    assert found.per_frozen_gflop_s == pytest.approx(known.per_frozen_gflop_s, rel=1e-6, abs=1e-9)
    assert found.per_factor_gflop_s == pytest.approx(known.per_factor_gflop_s, rel=1e-6, abs=1e-9)


def relative_error(constants: tuple[float, ...], given: list[tuple[Work, float]]) -> float:
    """Root of the sum of squared relative errors, by the formula of the module's docstring."""
    total = 0.0
    for done, seconds in given:
        operations = (done.layer_passes, done.frozen_operations / 1e9, done.factor_operations / 1e9)
        predicted = sum(c * o for c, o in zip(constants, operations, strict=True))
        total += (predicted / seconds - 1) ** 2
    return float(np.sqrt(total))


works = st.builds(Work, st.integers(1, 9), st.floats(1e8, 9e9), st.floats(1e8, 9e9))


@given(st.lists(st.tuples(works, st.floats(0.1, 10)), min_size=3, max_size=8))
def test_nothing_on_a_grid_of_constants_fits_better(given: list[tuple[Work, float]]) -> None:
    found = fit(given)
    constants = (found.per_layer_s, found.per_frozen_gflop_s, found.per_factor_gflop_s)
    assert min(constants) >= 0
    best = relative_error(constants, given)
    grid = np.linspace(0, 2, 9)
    around = [sorted({*(c * np.array([0.9, 0.99, 1.0, 1.01, 1.1])), 0.0, 0.01}) for c in constants]
    for tried in itertools.chain(itertools.product(grid, repeat=3), itertools.product(*around)):
        assert best <= relative_error(tried, given) + 1e-9


@pytest.mark.parametrize(
    "seconds", [[1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, float("inf")], [1, 1, float("nan")]]
)
def test_a_calibration_that_says_nothing(seconds: list[float]) -> None:
    with pytest.raises(InputError, match="needs three measured steps of positive time"):
        fit([(Work(1.0, 1e9, 1e9), s) for s in seconds])
