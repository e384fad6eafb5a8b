"""The time of a step: its work by hand, laws, and constants found again from what they predict."""

from __future__ import annotations

from dataclasses import astuple, replace
from math import sqrt
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.choice.model_facts import ModelFacts
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime, Work, fit, work

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


def setting(rank: int, **changes: Any) -> Setting:
    return replace(Setting(Ranks.uniform(rank), 0, sequence_len=10, micro_batch=2), **changes)


@pytest.mark.parametrize(("batch", "micro_batch", "passes"), [(8, 8, 1), (8, 3, 3), (1, 4, 1), (7, 1, 7)])
def test_micro_batches_are_counted_up(batch: int, micro_batch: int, passes: int) -> None:
    assert work(FACTS, setting(3, micro_batch=micro_batch), batch).layer_passes == 2 * passes


def test_seconds_by_hand() -> None:
    done = work(FACTS, setting(3, carry_rank=2), batch=4)
    times = StepTime(0.5, 2.0, 3.0, 5.0, 7.0, 11.0)
    expected = 0.5 * 4 + 2.0 * done.frozen_gflops + 3.0 * done.trained_gflops
    expected += 5.0 * done.carried_gflops + 7.0 * (40 * 100 / 1e6) + 11.0 * 2
    assert times.step_s(FACTS, setting(3, carry_rank=2), batch=4) == pytest.approx(expected, rel=1e-12)


constants = st.floats(1e-6, 10)
sizes = st.integers(1, 32)


step_times = st.builds(StepTime, *[constants] * 6)


@given(step_times, sizes, sizes, sizes, sizes, sizes, st.booleans())
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


@given(st.integers(0, 10**6))
def test_no_other_constants_fit_better(seed: int) -> None:
    """Against a naive search among constants that make thin factors no cheaper than wide matrices."""
    draw = Random(seed)
    given = [
        (Work(*(draw.uniform(0.1, 9) for _ in range(6))), draw.uniform(0.1, 10))
        for _ in range(draw.randint(3, 8))
    ]
    best = error(astuple(fit(given)), given)
    for _ in range(50):
        tried = [draw.choice((0.0, draw.random(), 0.1 * draw.random())) for _ in range(6)]
        tried[2], tried[3] = tried[1] + tried[2], tried[1] + tried[3]
        assert best <= error(tuple(tried), given) + 1e-6


def error(constants: tuple[float, ...], given: list[tuple[Work, float]]) -> float:
    """Root of the sum of squared relative errors, by the formula of the module's docstring."""
    total = 0.0
    for done, seconds in given:
        predicted = sum(c * amount for c, amount in zip(constants, astuple(done), strict=True))
        total += (predicted / seconds - 1) ** 2
    return sqrt(total)
