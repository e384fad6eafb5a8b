"""Ranks by kind of module, and the settings of a training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.choice.setting import Kind, Ranks, Setting, kind_of
from edge_sdk.core.errors import InputError

ranks = st.builds(Ranks, st.integers(1, 999), st.integers(1, 999))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.11.self_attn.o_proj", "attention"),
        ("transformer.h.3.attn.c_attn", "attention"),
        ("transformer.h.3.attn.c_proj", "attention"),
        ("gpt_neox.layers.0.attention.query_key_value", "attention"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("transformer.h.3.mlp.c_proj", "mlp"),
        ("model.layers.0.attnless.dense", "mlp"),  # a part of a name only as a whole
        ("block.0.fc1", "mlp"),
    ],
)
def test_the_kind_of_a_module(module: str, kind: Kind) -> None:
    assert kind_of(module) == kind
    assert Ranks(attention=30, mlp=200).of(module) == {"attention": 30, "mlp": 200}[kind]


def test_ranks_are_read_as_they_are_written() -> None:
    assert Ranks.parse("8") == Ranks.uniform(8) == Ranks(8, 8)
    assert Ranks.parse("attention=30,mlp=200") == Ranks(30, 200)
    assert Ranks.parse("attention=30, mlp=200") == Ranks(30, 200)
    assert str(Ranks(30, 200)) == "attention=30,mlp=200"
    assert str(Ranks(8, 8)) == "8"
    assert Ranks(30, 200).largest == Ranks(200, 30).largest == 200


@given(ranks)
def test_what_is_written_is_read(given: Ranks) -> None:
    assert Ranks.parse(str(given)) == given
    assert given.largest in (given.attention, given.mlp)
    assert min(given.attention, given.mlp) <= given.largest


@pytest.mark.parametrize("text", ["", "eight", "-8", "8.0", "attention=30", "mlp=200,attention=30", "30,200"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"rank '{text}': write a number, or attention=30,mlp=200"):
        Ranks.parse(text)


@pytest.mark.parametrize("text", ["0", "attention=0,mlp=8", "attention=8,mlp=0"])
def test_rank_0_trains_nothing(text: str) -> None:
    with pytest.raises(InputError, match="are impossible; train at least rank 1"):
        Ranks.parse(text)


@pytest.mark.parametrize(
    ("carry_rank", "sequence_len", "micro_batch"), [(-1, 64, 4), (0, 0, 4), (0, 64, 0), (0, -1, -1)]
)
def test_impossible_settings(carry_rank: int, sequence_len: int, micro_batch: int) -> None:
    with pytest.raises(InputError, match=f"{sequence_len} and micro-batch {micro_batch} must be 1 or more"):
        Setting(Ranks.uniform(4), carry_rank, sequence_len, micro_batch)


def test_a_setting_says_what_is_unusual_about_it() -> None:
    assert str(Setting(Ranks.uniform(4), 0, 64, 8)) == "rank 4, 8 × 64 tokens at a time"
    assert str(Setting(Ranks(3, 5), 16, 64, 1, True, "adamw8bit", "nf4")) == (
        "rank attention=3,mlp=5, 1 × 64 tokens at a time, carrying 16 in nf4, checkpointing, 8-bit optimiser"
    )
