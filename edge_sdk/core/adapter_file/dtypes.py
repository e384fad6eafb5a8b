"""The factors of one module in the dtypes of the wire: float32, float16, or int8 in blocks with a scale each.

A component is one column of B and one row of A. Components of an adapter differ in size by orders, so that no
scale is shared between two of them, and the first r components are packed alike whatever follows them: the
files of all ranks of a version are made of the same values.

int8 is symmetric: of 64 values `x` of one component, `scale = max|x| / 127` and `q = round(x / scale)`, as in
blockwise quantisation of optimiser states (Dettmers et al. 2022, arXiv:2110.02861, section 2.1), but linear.
An error is at most half a scale, and is relative to the largest of 64 neighbours, not of the whole factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors, Matrix

WireDtype = Literal["float32", "float16", "int8"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)

INT8_BLOCK = 64
SCALE_BYTES = 4  # float32: float16 would save 3 % of a file and lose what is below 6e-8

# Of factors that are at least a block wide; `adapter_header.max_adapter_bytes` is exact.
BYTES_PER_VALUE: Mapping[WireDtype, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "int8": 1.0 + SCALE_BYTES / INT8_BLOCK,
}
INT8_LARGEST = 127
FLOAT16_LARGEST = 65504.0

# Names of a module's tensors: PEFT's own for floating point, and others for what PEFT cannot read, so that it
# says so instead of taking integers for weights.
WEIGHT_A, WEIGHT_B = ".lora_A.weight", ".lora_B.weight"
INT8_A, INT8_B = ".lora_A.int8", ".lora_B.int8"
SCALES_A, SCALES_B = ".lora_A.scales", ".lora_B.scales"


@dataclass(frozen=True)
class Packed:
    """One module as it lies in a file: ends of tensors' names to their values, in order, little-endian.

    Floating point: A (r, in) and B (out, r). int8: A (r, in), the transpose of B (r, out), and of each the
    scales (r, blocks).
    """

    tensors: Mapping[str, npt.NDArray[np.generic]]

    def leading(self, rank: int) -> Packed:
        """The first `rank` components, as views."""
        cut = {end: t[:, :rank] if end == WEIGHT_B else t[:rank] for end, t in self.tensors.items()}
        return Packed(cut)


def pack(factors: LoraFactors, scaling: float, dtype: WireDtype) -> Packed:
    """Factors as a file holds them. `scaling` is taken out of B again, as PEFT has it.

    Raises:
        AdapterError: a value is not finite, or the module does not fit float16 in any way.
    """
    b, a = factors.b / scaling, factors.a
    if dtype == "float32":
        return Packed({WEIGHT_A: a.astype("<f4", copy=False), WEIGHT_B: b.astype("<f4", copy=False)})
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        raise AdapterError("holds values that are not finite")
    if dtype == "float16":
        b, a = _within_float16(b, a)
        return Packed({WEIGHT_A: a.astype("<f2"), WEIGHT_B: b.astype("<f2")})
    q_a, scales_a = quantised(a)
    q_b, scales_b = quantised(b.T)
    return Packed({INT8_A: q_a, INT8_B: q_b, SCALES_A: scales_a, SCALES_B: scales_b})


def unpack(
    tensors: Mapping[str, npt.NDArray[np.generic]], scaling: float, owned: bool = False
) -> LoraFactors:
    """The float32 factors of tensors by the ends of their names, scaling folded in.

    `owned`: nobody else needs the tensors, so that B is scaled where it lies and no second one is held.

    Raises:
        AdapterError: a value, or a scale, is not finite.
    """
    if INT8_A in tensors:
        a = dequantised(tensors[INT8_A], tensors[SCALES_A])
        b = dequantised(tensors[INT8_B], tensors[SCALES_B]).T
    else:
        a = tensors[WEIGHT_A].astype(np.float32, copy=False)
        b = tensors[WEIGHT_B].astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # a huge B becomes infinite here and is refused like one
        b = np.multiply(b, np.float32(scaling), out=b if owned else None)
    if not (_is_finite(b) and _is_finite(a)):
        raise AdapterError("holds values that are not finite")
    return LoraFactors(b, a)


def quantised(rows: Matrix, block: int = INT8_BLOCK) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Values (r, width) in int8 and the scales (r, ⌈width / block⌉) of their blocks; the last may be short.

    Every operation is one that IEEE 754 defines to the last bit, so that the same values give the same bytes.
    """
    rank, width = rows.shape
    blocks = blocks_of(width, block)
    filled = np.zeros((rank, blocks * block), np.float32)
    filled[:, :width] = rows
    parted = filled.reshape(rank, blocks, block)
    scales = np.abs(parted).max(axis=2) / np.float32(INT8_LARGEST)
    parted /= np.where(scales > 0, scales, np.float32(1))[:, :, None]  # a block of zeros stays one
    np.rint(parted, out=parted)
    np.clip(parted, -INT8_LARGEST, INT8_LARGEST, out=parted)  # a scale below float32's normal range is coarse
    return filled.astype(np.int8)[:, :width], scales.astype("<f4")


def dequantised(
    values: npt.NDArray[np.generic], scales: npt.NDArray[np.generic], block: int = INT8_BLOCK
) -> Matrix:
    """The float32 values (r, width) of int8 ones and their scales.

    Raises:
        AdapterError: a scale is negative or not finite.
    """
    factors = scales.astype(np.float32)
    if not (np.isfinite(factors).all() and (factors >= 0).all()):
        raise AdapterError("holds scales that are negative or not finite")
    rank, width = values.shape
    dense = np.repeat(factors, block, axis=1)[:, :width]
    with np.errstate(over="ignore"):  # 127 times the largest scale: the caller refuses what is infinite
        dense *= values.astype(np.float32).reshape(rank, width)
    return dense


def blocks_of(width: int, block: int = INT8_BLOCK) -> int:
    """How many blocks the values of one component are parted into."""
    return -(-width // block)


def _is_finite(values: Matrix) -> bool:
    """Whether all values are. A sum of squares tells it in one pass, unless it leaves float32 itself."""
    flat = values.reshape(-1, order="A")  # a view, whichever way it lies in memory
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.dot(flat, flat))
    return math.isfinite(total) or bool(np.isfinite(values).all())


def _within_float16(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The same product with every value within float16.

    A component that is too large on one side is moved to the other by a power of two, which rounds nothing.
    Others are left as they are, because some rules average A and B by themselves. That no value fits either
    way takes a product of 4e9.

    Raises:
        AdapterError: a component is too large on both sides.
    """
    if max(_largest(b), _largest(a)) <= FLOAT16_LARGEST:
        return b, a
    most_b = np.abs(b).max(axis=0).astype(np.float64)
    most_a = np.abs(a).max(axis=1).astype(np.float64)
    shifts = _halvings(most_b) - _halvings(most_a)
    b, a = np.ldexp(b, -shifts), np.ldexp(a, shifts[:, None])
    if max(_largest(b), _largest(a)) > FLOAT16_LARGEST:
        raise AdapterError("exceeds float16 in both B and A; send it in float32")
    return b, a


def _largest(values: Matrix) -> float:
    """The largest absolute value; 0 of none."""
    return float(max(values.max(initial=0.0), -values.min(initial=0.0)))


def _halvings(most: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """How often to halve values of these sizes until float16 holds them."""
    ratio = most / FLOAT16_LARGEST
    return np.where(ratio > 1, np.frexp(ratio)[1], 0).astype(np.int32)
