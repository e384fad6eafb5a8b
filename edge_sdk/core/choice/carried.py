"""What a device holds frozen of the global adapter under the rule `carry`: in which dtype, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CarriedDtype = Literal["float32", "bfloat16", "int8", "nf4"]

INT8_SCALE_BYTES = 4  # one float32 scale a component, in each of its two factors
NF4_BLOCK = 64  # values to one absmax, as QLoRA has them (Dettmers et al. 2023, arXiv:2305.14314, section 3)
NF4_ABSMAX_BYTES = 4  # not quantised a second time: that would save 0.05 bytes a value of something small

# Bytes per value, scales and absmax included, of factors that are at least 64 wide. `held_bytes` is exact.
BYTES_PER_VALUE: dict[CarriedDtype, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0 + INT8_SCALE_BYTES / 64,
    "nf4": 0.5 + NF4_ABSMAX_BYTES / NF4_BLOCK,
}


def held_bytes(dtype: CarriedDtype, rank: int, out_features: int, in_features: int) -> int:
    """Bytes that the frozen factors of one module take: B (out, rank) and A (rank, in).

    A component is a row of `in` and a row of `out` values. Scales and blocks belong to one row, because
    components differ in size: one scale for several would leave nothing of the small ones. An NF4 row is
    filled up to whole blocks.
    """
    return sum(_row_bytes(dtype, width) for width in (out_features, in_features)) * rank


def _row_bytes(dtype: CarriedDtype, width: int) -> int:
    """Bytes of `width` values of one component."""
    if dtype == "float32":
        return 4 * width
    if dtype == "bfloat16":
        return 2 * width
    if dtype == "int8":
        return width + INT8_SCALE_BYTES
    blocks = -(-width // NF4_BLOCK)
    return blocks * (NF4_BLOCK // 2 + NF4_ABSMAX_BYTES)


@dataclass(frozen=True)
class MemorySplit:
    """What a device does with its memory: train `rank`, hold `carry_rank` components frozen in `dtype`."""

    rank: int
    carry_rank: int
    dtype: CarriedDtype


# The packed dtypes, best first. On a target whose answer is known the error with int8 is that with float32
# (0.074); with NF4 it stops at 0.111: a device learns what its copy of the global adapter got wrong, and
# sends that too. bfloat16 takes twice the memory of int8 and gains nothing.
WHOLE_IN: tuple[CarriedDtype, ...] = ("int8", "nf4")

# The shares of the live components that are worth carrying where not all of them fit. If all devices carry so
# little, the error is 1.1 times that with everything at three quarters, 1.7 at half, 2.5 at a quarter and 10
# at none. If one device in five does, it is 1.03 at half, and at none 1.4: worse than without that device.
SHARES = (0.75, 0.5)


def splits(ladder: Sequence[int], live_rank: int) -> list[MemorySplit]:
    """What a device may do under the rule `carry`, best first: take the first that fits the memory.

    A trained rank costs as much as 15 components in int8 or 28 in NF4. On a target whose answer is known,
    what devices carry decides and what they train does not; in real training a higher rank learns faster too
    (docs/CARRY.md). So the whole global adapter comes first, and NF4 is the price for the next rank of the
    ladder. Where not even the lowest rank fits beside it in NF4, the tail is left out, down to half of the
    components. There the list ends: a device with less does little for the others, and at last harms them.

    Args:
        ladder: ranks that a device may train.
        live_rank: of the version to train from, or the rank cap, which it never exceeds.
    """
    if live_rank == 0:
        return [MemorySplit(rank, 0, "float32") for rank in sorted(ladder, reverse=True)]
    best_first = sorted(ladder, reverse=True)
    whole = [MemorySplit(rank, live_rank, dtype) for rank in best_first for dtype in WHOLE_IN]
    parts = (math.ceil(share * live_rank) for share in SHARES)
    return [*whole, *(MemorySplit(min(ladder), part, "nf4") for part in parts if part < live_rank)]
