"""The layers that hold LoRA factors: a trained one in float32, a frozen one in 32, 16, 8 or 4 bits.

A frozen factor is unpacked only while it multiplies. It is held by components: row i of `A` (rank, in),
column i of `B` (out, rank). int8 has one scale a component, `w ≈ scale·q` with q in -127…127; NF4 has one
absmax to each 64 values of a component (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from typing import Any

import torch

from edge_sdk.core.choice.carried import NF4_BLOCK, CarriedDtype

INT8_LARGEST = 127


class TrainedFactor(torch.nn.Linear):
    """`x ↦ x·Wᵀ` with a float32 weight W (out, in), computed in the dtype of x.

    PEFT would cast x to float32 instead, once for every target module, and keep those copies for the
    backward pass: half of all activations in bfloat16, because query, key and value each hold a copy of one
    and the same input. Here W is cast, which is small, and the input stays shared. The gradient of W is
    float32 again.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


class FrozenFactor(torch.nn.Module):
    """`x ↦ x Wᵀ` for a frozen W, computed in the dtype of x; gradients pass through to x alone.

    Args:
        weight: W, (out_features, in_features).
        held: how it is kept in memory.
        compute: dtype that PEFT casts inputs to, told by the `weight` attribute, which holds no values.
        components: the axis of W that counts components: 0 for an A factor, 1 for a B factor.
    """

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, held: CarriedDtype, compute: torch.dtype, components: int
    ) -> None:
        super().__init__()
        self.held, self._transposed = held, components == 1
        self.weight = torch.empty(weight.shape, dtype=compute, device="meta")
        rows = weight.detach().float()
        packed, scales = _pack(rows.T.contiguous() if self._transposed else rows, held)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W unpacked, (out_features, in_features)."""
        shape = self.weight.shape
        rows = _unpack(self.packed, self.scales, self.held, shape[::-1] if self._transposed else shape, dtype)
        return rows.T if self._transposed else rows

    def held_bytes(self) -> int:
        """Memory that W takes between its uses."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: (…, in_features) to (…, out_features)."""
        product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """`x Wᵀ` that unpacks W again in the backward pass, so that no dense W waits for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: FrozenFactor) -> torch.Tensor:
        ctx.factor = factor
        return torch.nn.functional.linear(x, factor.dense(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.factor.dense(gradient.dtype), None


def _pack(rows: torch.Tensor, held: CarriedDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales (none in floating point) of float32 rows, one component each."""
    if held == "float32":
        return rows.clone(), rows.new_empty(0)
    if held == "bfloat16":
        return rows.bfloat16(), rows.new_empty(0)
    if held == "int8":
        scales = rows.abs().amax(dim=1) / INT8_LARGEST
        # A dead component is zero throughout; any scale but zero keeps it so.
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        return (rows / divisors[:, None]).round().to(torch.int8), scales
    from bitsandbytes.functional import quantize_4bit  # base_model.load has imported it quietly

    # Filled up with zeros, which NF4 holds exactly, so that no block reaches into the next component.
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % NF4_BLOCK))
    packed, state = quantize_4bit(filled.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _unpack(
    packed: torch.Tensor,
    scales: torch.Tensor,
    held: CarriedDtype,
    shape: torch.Size,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The rows that `_pack` packed, (components, width)."""
    if held in ("float32", "bfloat16"):
        return packed.to(dtype)
    if held == "int8":
        return packed.to(dtype) * scales.to(dtype)[:, None]
    from bitsandbytes.functional import QuantState, dequantize_4bit

    filled = torch.Size((shape[0], shape[1] + -shape[1] % NF4_BLOCK))
    state = QuantState(scales, filled, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    rows: torch.Tensor = dequantize_4bit(packed, state)
    return rows[:, : shape[1]]
