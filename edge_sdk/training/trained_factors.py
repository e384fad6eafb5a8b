"""The layer that holds one trained LoRA factor: stored in float32, computed in the model's dtype."""

from __future__ import annotations

import torch


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
