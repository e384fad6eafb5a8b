"""Bytes of a carried adapter, by hand, and the order in which a device's choices are tried."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.choice.carried import BYTES_PER_VALUE, CarriedDtype, MemorySplit, held_bytes, splits

ladders = st.lists(st.integers(1, 64), min_size=1, max_size=5, unique=True)


def test_bytes_by_hand() -> None:
    # A component of a module (128, 64) is 128 + 64 = 192 values, two scales, or 2 + 1 blocks of 64.
    assert held_bytes("float32", 3, 128, 64) == 3 * 192 * 4
    assert held_bytes("bfloat16", 3, 128, 64) == 3 * 192 * 2
    assert held_bytes("int8", 3, 128, 64) == 3 * (192 + 2 * 4)
    assert held_bytes("nf4", 3, 128, 64) == 3 * (3 * 32 + 3 * 4)
    # 65 values fill two blocks.
    assert held_bytes("nf4", 1, 65, 64) == 3 * (32 + 4)
    assert held_bytes("nf4", 0, 65, 64) == 0


@given(st.sampled_from(sorted(BYTES_PER_VALUE)), st.integers(0, 64), st.integers(1, 64), st.integers(1, 64))
def test_the_figure_for_choosing_is_never_too_small_for_whole_blocks(
    dtype: CarriedDtype, rank: int, out_blocks: int, in_blocks: int
) -> None:
    out, in_ = 64 * out_blocks, 64 * in_blocks
    assert held_bytes(dtype, rank, out, in_) <= BYTES_PER_VALUE[dtype] * rank * (out + in_)


def test_the_order_by_hand() -> None:
    assert splits([2, 8], 32) == [
        MemorySplit(8, 32, "int8"),
        MemorySplit(8, 32, "nf4"),
        MemorySplit(2, 32, "int8"),
        MemorySplit(2, 32, "nf4"),
        MemorySplit(2, 24, "nf4"),
        MemorySplit(2, 16, "nf4"),
    ]


@given(ladders, st.integers(1, 256))
def test_less_than_half_is_never_carried_and_nothing_twice(ladder: list[int], live_rank: int) -> None:
    found = splits(ladder, live_rank)
    assert len(found) == len(set(found))
    assert {split.rank for split in found} == set(ladder)
    assert all(live_rank / 2 <= split.carry_rank <= live_rank for split in found)
    # A part is only ever carried beside the lowest rank, and after the whole.
    partly = [split.carry_rank < live_rank for split in found]
    assert partly == sorted(partly)
    assert all(split.rank == min(ladder) for split, part in zip(found, partly, strict=True) if part)


@given(ladders)
def test_at_version_0_there_is_nothing_to_carry(ladder: list[int]) -> None:
    found = splits(ladder, 0)
    assert [split.rank for split in found] == sorted(ladder, reverse=True)
    assert {split.carry_rank for split in found} == {0}
