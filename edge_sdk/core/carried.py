"""What a device holds frozen of the global adapter under the rule `carry`: in which dtype, at what cost."""

from __future__ import annotations

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
