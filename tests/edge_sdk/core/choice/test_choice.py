"""The choice of how to train: what fits, what is given up first, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_sdk.core.choice.carried import splits
from edge_sdk.core.choice.memory import Placement, estimate
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.rank import SHORTEST_SEQUENCE, Carry, Device, Limits, RankChoice, choose
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Training

PLACE = Placement(compute_bytes=4, heap_spread=0.0)
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
BLOCK = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
SHAPES = {f"model.layers.{n}.{name}": shape for n in range(6) for name, shape in BLOCK.items()}
FACTS = facts_from_config(CONFIG, SHAPES)
TRAINING = Training(steps=10, batch=8, sequence_len=128)
LADDER = [Ranks.uniform(rank) for rank in (2, 4, 8, 16)]
PLENTY, NOTHING = 10**12, Carry()


def peak(at: Setting, facts: ModelFacts = FACTS) -> int:
    return estimate(facts, at, PLACE).peak_bytes


def at(rank: int, **changes: Any) -> Setting:
    return replace(Setting(Ranks.uniform(rank), 0, 128, 8), **changes)


def chosen(budget: int, carry: Carry = NOTHING, **more: Any) -> RankChoice:
    limits = Limits(budget, **{k: more.pop(k) for k in list(more) if k in Limits.__dataclass_fields__})
    device = Device(PLACE, **{k: more.pop(k) for k in list(more) if k in Device.__dataclass_fields__})
    ladder, training = more.pop("ladder", LADDER), more.pop("training", TRAINING)
    return choose(FACTS, training, ladder, carry, limits, device, **more)


# --- memory ---------------------------------------------------------------------------------------


def test_the_largest_rank_that_fits_and_why_not_the_next() -> None:
    choice = chosen(peak(at(8)))
    assert choice.setting == at(8)
    assert choice.rank == choice.chosen.rank == 8
    assert [c.rank for c in choice.candidates] == [16, 8, 4, 2]
    assert [c.fits for c in choice.candidates] == [False, True, True, True]
    assert [c.peak_bytes for c in choice.candidates] == [peak(at(r)) for r in (16, 8, 4, 2)]
    assert [c.upload_bytes for c in choice.candidates] == [4 * FACTS.adapter_values(r) for r in (16, 8, 4, 2)]
    assert all(c.step_s is None and c.assignment_s is None for c in choice.candidates)
    assert choice.reason == "rank 8 needs 156 MB; rank 16 needs 160 MB, 4.2 MB over the budget"
    top = chosen(PLENTY)
    assert top.reason == "rank 16 needs 160 MB; it is the top of the ladder"


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_one_byte_decides(rank: int) -> None:
    assert chosen(peak(at(rank))).rank == rank
    assert chosen(peak(at(rank)) - 1).rank == rank // 2


def test_ways_are_given_up_in_the_order_of_the_docstring() -> None:
    """For each way, the budget of its highest rank; one byte below the lowest rank of it is the next way."""
    ways = [at(2, micro_batch=size) for size in (8, 4, 2, 1)]
    ways += [at(2, micro_batch=size, checkpointing=True) for size in (8, 4, 2, 1)]
    ways += [at(2, micro_batch=1, checkpointing=True, optimizer="adamw8bit")]
    ways += [replace(ways[-1], sequence_len=SHORTEST_SEQUENCE)]
    seen = []
    for budget in range(170_000_000, 0, -500_000):
        try:
            setting = replace(chosen(budget).setting, ranks=Ranks.uniform(2))
        except InputError:
            break
        if setting not in seen:
            seen.append(setting)
    places = [ways.index(setting) for setting in seen]
    # A way that needs no less than the one before it is never reached; the others come in their order.
    assert places == sorted(places)
    assert {0, 1, 2, 3} <= set(places)
    assert ways[-1] in seen
    least = peak(ways[-1])
    assert chosen(least).setting == ways[-1]
    with pytest.raises(InputError):
        chosen(least - 1)


def test_what_was_given_up_is_said() -> None:
    choice = chosen(peak(at(16, micro_batch=2)))
    assert (choice.rank, choice.setting.micro_batch) == (16, 2)
    assert choice.reason.endswith("top of the ladder; to fit at all, the batch of 8 runs 2 at a time")
    least = Setting(Ranks.uniform(2), 0, 64, 1, True, "adamw8bit")
    assert chosen(peak(least)).reason.endswith(
        "; to fit at all, the batch of 8 runs 1 at a time, activations are computed twice, "
        "the optimiser keeps 8-bit moments, examples are cut to 64 tokens"
    )


def test_too_little_for_anything() -> None:
    with pytest.raises(InputError) as caught:
        chosen(9_000_000)
    assert str(caught.value) == (
        "not enough memory to train: rank 2, 1 × 64 tokens at a time, checkpointing, 8-bit optimiser needs "
        f"{peak(Setting(Ranks.uniform(2), 0, 64, 1, True, 'adamw8bit')) / 1e6:.0f} MB, the budget is 9.0 MB; "
        "close other programs, raise the budget, or ask the host for a smaller base model"
    )


def test_texts_are_never_cut_below_the_shortest_nor_lengthened() -> None:
    short = Training(batch=1, sequence_len=40)
    assert chosen(PLENTY, training=short).setting.sequence_len == 40
    with pytest.raises(InputError, match="1 × 40 tokens at a time"):
        chosen(1, training=short)
    assert chosen(PLENTY, longest=50).setting.sequence_len == 50
    assert chosen(PLENTY, longest=5000).setting.sequence_len == 128
    assert "cut" not in chosen(PLENTY, longest=50).reason


def test_short_examples_leave_room_for_a_higher_rank() -> None:
    budget = peak(at(2))
    assert chosen(budget).rank == 2
    assert chosen(budget, longest=64).rank == 16


def test_what_was_measured_before_corrects_the_prediction() -> None:
    place = replace(PLACE, framework_bytes=400_000_000)
    plain = choose(FACTS, TRAINING, LADDER, NOTHING, Limits(PLENTY), Device(place))
    for factor in (0.5, 1.25):
        scaled = choose(FACTS, TRAINING, LADDER, NOTHING, Limits(PLENTY), Device(place, correction=factor))
        for before, after in zip(plain.candidates, scaled.candidates, strict=True):
            own = before.peak_bytes - 400_000_000  # the libraries were measured; nothing to correct there
            assert after.peak_bytes == 400_000_000 + round(factor * own)
    assert chosen(peak(at(8)), correction=1.02).rank < 8


# --- time and link --------------------------------------------------------------------------------

TIMES = StepTime(0.01, 0.05, 2.0, 2.0, 0.0)


def test_the_deadline_decides_and_is_named() -> None:
    seconds = {r: 10 * TIMES.step_s(FACTS, at(r), 8) for r in (2, 4, 8, 16)}
    choice = chosen(PLENTY, times=TIMES, deadline_s=seconds[8])
    assert choice.rank == 8
    assert choice.candidates[0].assignment_s == pytest.approx(seconds[16])
    assert choice.candidates[0].why_not == (
        f"needs {seconds[16]:.0f} s of {seconds[8]:.0f} s, most of it for training"
    )
    assert choice.reason.endswith(f"; rank 16 {choice.candidates[0].why_not}")
    assert chosen(PLENTY, times=TIMES, deadline_s=seconds[8] * 0.999).rank == 4
    assert chosen(PLENTY, times=TIMES).rank == 16  # without a deadline time does not count


def test_a_slow_link_decides_and_is_named() -> None:
    size = 4 * FACTS.adapter_values(8)
    choice = chosen(PLENTY, upload_bytes_s=size / 50, deadline_s=60.0)  # 50 s for rank 8, no time measured
    assert choice.rank == 8
    assert choice.candidates[0].why_not == "needs 100 s of 60 s, most of it for its transfers"
    both = chosen(PLENTY, upload_bytes_s=size / 50, download_bytes_s=size / 50, deadline_s=60.0)
    assert both.rank == 4
    assert chosen(PLENTY, upload_bytes_s=1.0).rank == 16


def test_under_carry_the_carried_components_are_fetched() -> None:
    rate = 4 * FACTS.adapter_values(32) / 50
    carry = Carry(32)
    slow = chosen(PLENTY, carry, download_bytes_s=rate, deadline_s=60.0, times=StepTime(0, 0, 0, 0, 0))
    assert slow.chosen.assignment_s == pytest.approx(50)


def test_late_work_is_better_than_none() -> None:
    """Where no rank is quick enough the smallest is taken, and the reason says so."""
    choice = chosen(PLENTY, times=TIMES, deadline_s=1.0)
    assert choice.rank == 2
    assert not any(c.fits for c in choice.candidates)
    needed = choice.chosen.why_not
    assert needed.startswith("needs ")
    assert (
        choice.reason
        == f"rank 2 needs 153 MB; no rank is quick enough: it {needed}, and late work still counts"
    )
    # Memory comes before time: what does not fit is not taken for being the last.
    tight = chosen(peak(at(4)), times=TIMES, deadline_s=1.0)
    assert tight.chosen.peak_bytes <= peak(at(4))


# --- carry ----------------------------------------------------------------------------------------


def carrying(rank: int, components: int, dtype: Any, **changes: Any) -> Setting:
    return at(rank, carry_rank=components, carried_dtype=dtype, **changes)


def test_what_is_carried_follows_the_measured_order() -> None:
    order = splits([2, 4, 8, 16], 32)
    choice = chosen(PLENTY, Carry(32))
    found = [(c.rank, c.setting.carry_rank, c.setting.carried_dtype) for c in choice.candidates]
    assert found == [(split.rank, split.carry_rank, split.dtype) for split in order]
    assert choice.setting == carrying(16, 32, "int8")
    assert "rank 16 needs" in choice.reason
    assert "with 32 components carried in int8" in choice.reason


def test_under_carry_the_first_of_the_order_that_fits_is_taken() -> None:
    for split in splits([2, 4, 8, 16], 32):
        budget = peak(carrying(split.rank, split.carry_rank, split.dtype))
        assert chosen(budget, Carry(32)).setting == carrying(split.rank, split.carry_rank, split.dtype)


def test_nf4_is_explained_by_what_int8_needs() -> None:
    choice = chosen(peak(carrying(8, 32, "nf4")), Carry(32))
    assert choice.setting == carrying(8, 32, "nf4")
    assert "; rank 8 with int8 needs" in choice.reason
    assert choice.reason.endswith("over the budget")


def test_what_is_settled_is_carried_whole_or_nothing_is_trained() -> None:
    part = peak(carrying(2, 24, "nf4"))
    assert chosen(part, Carry(32)).setting.carry_rank == 24
    settled = chosen(part, Carry(32, settled=True))
    assert settled.setting.carry_rank == 32
    assert settled.setting.micro_batch < 8
    assert {c.setting.carry_rank for c in settled.candidates} == {32}
    assert chosen(part, Carry(0, settled=True)).setting.carry_rank == 0


# --- unequal ranks --------------------------------------------------------------------------------

MIXED = Ranks(attention=30, mlp=200)


def test_unequal_ranks_stand_among_the_others_by_size() -> None:
    ladder = [*LADDER, MIXED, Ranks.uniform(64), Ranks.uniform(256)]
    sizes = {str(ranks): FACTS.adapter_values(ranks) for ranks in ladder}
    choice = chosen(PLENTY, ladder=ladder)
    found = [str(c.setting.ranks) for c in choice.candidates]
    assert found == sorted(sizes, key=sizes.__getitem__, reverse=True)
    assert found[:3] == ["256", "attention=30,mlp=200", "64"]
    budget = peak(at(1, ranks=MIXED))
    fits = chosen(budget, ladder=ladder)
    assert fits.setting.ranks == MIXED
    assert fits.rank == 200  # what the coordinator is told
    assert fits.chosen.upload_bytes == 4 * FACTS.adapter_values(MIXED)
    assert fits.reason.startswith("rank attention=30,mlp=200 needs ")
    assert chosen(budget - 1, ladder=ladder).setting.ranks == Ranks.uniform(64)


def test_unequal_ranks_under_carry_stand_where_their_larger_one_does() -> None:
    ladder = [Ranks.uniform(2), Ranks.uniform(16), Ranks(attention=4, mlp=16)]
    settings = [c.setting for c in chosen(PLENTY, Carry(32), ladder=ladder).candidates]
    whole = [(str(s.ranks), s.carried_dtype) for s in settings if s.carry_rank == 32]
    mixed = "attention=4,mlp=16"
    assert whole == [
        ("16", "int8"),
        (mixed, "int8"),
        ("16", "nf4"),
        (mixed, "nf4"),
        ("2", "int8"),
        ("2", "nf4"),
    ]
    assert [(str(s.ranks), s.carry_rank) for s in settings[6:]] == [("2", 24), ("2", 16)]


# --- impossible ladders ---------------------------------------------------------------------------


def test_impossible_ladders() -> None:
    with pytest.raises(InputError, match="the ladder of ranks is empty; give at least one rank"):
        chosen(PLENTY, ladder=[])
    message = r"rank 300 on the ladder is larger than any module: .*q_proj is 256 × 256, so at most 256"
    with pytest.raises(InputError, match=message):
        chosen(PLENTY, ladder=[Ranks.uniform(2), Ranks(attention=2, mlp=300)])
    assert chosen(PLENTY, ladder=[Ranks.uniform(256)]).rank == 256  # k and v are narrower; q is not
    with pytest.raises(InputError, match="no target modules; name the linear layers"):
        choose(replace(FACTS, shapes={}), TRAINING, LADDER, NOTHING, Limits(PLENTY))


# --- laws -----------------------------------------------------------------------------------------

ladders = st.lists(st.builds(Ranks, st.integers(1, 256), st.integers(1, 256)), min_size=1, max_size=4)
budgets = st.integers(5_000_000, 400_000_000)
carries = st.one_of(st.just(NOTHING), st.builds(Carry, st.integers(1, 64), st.booleans()))


def attempt(budget: int, ladder: list[Ranks], carry: Carry, **more: Any) -> RankChoice | None:
    try:
        return chosen(budget, carry, ladder=ladder, **more)
    except InputError:
        return None


@given(budgets, ladders, carries, st.floats(1e-3, 1e3))
def test_what_is_chosen_fits_and_all_that_was_better_does_not(
    budget: int, ladder: list[Ranks], carry: Carry, deadline_s: float
) -> None:
    choice = attempt(budget, ladder, carry, times=TIMES, deadline_s=deadline_s)
    if choice is None:
        return
    assert choice.chosen.peak_bytes == peak(choice.setting) <= budget
    before = choice.candidates[: choice.candidates.index(choice.chosen)]
    if choice.chosen.fits:
        assert not any(better.fits for better in before)
    else:
        assert not any(candidate.fits for candidate in choice.candidates)
    assert choice.setting.ranks in ladder
    assert choice.setting.carry_rank <= carry.components
    assert all(c.why_not for c in choice.candidates if c.peak_bytes > budget)


@given(budgets, st.integers(0, 10**8), ladders, carries)
def test_more_memory_never_means_less_training(
    budget: int, more: int, ladder: list[Ranks], carry: Carry
) -> None:
    small, large = attempt(budget, ladder, carry), attempt(budget + more, ladder, carry)
    if small is None:
        return
    assert large is not None
    # In the order of ways: longer texts, plain moments, no recomputation, larger micro-batches.
    assert _way(large.setting) >= _way(small.setting)
    if _way(large.setting) == _way(small.setting):
        rank_of = [c.setting for c in large.candidates].index
        assert rank_of(large.setting) <= rank_of(small.setting)


def _way(at: Setting) -> tuple[int, bool, bool, int]:
    return at.sequence_len, at.optimizer == "adamw", not at.checkpointing, at.micro_batch


@given(ladders, st.sampled_from([1, 2, 8]))
def test_at_exactly_the_least_peak_it_fits_and_one_byte_below_it_does_not(
    ladder: list[Ranks], batch: int
) -> None:
    training = replace(TRAINING, batch=batch)
    smallest = min(ladder, key=FACTS.adapter_values)
    least = peak(Setting(smallest, 0, 64, 1, True, "adamw8bit"))
    assume(all(peak(Setting(ranks, 0, 64, 1, True, "adamw8bit")) >= least for ranks in ladder))
    assert attempt(least, ladder, NOTHING, training=training) is not None
    assert attempt(least - 1, ladder, NOTHING, training=training) is None
