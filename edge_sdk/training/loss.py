"""Cross-entropy over a large vocabulary in as little memory as it takes."""

from __future__ import annotations

from typing import Any

import torch

from edge_sdk.text.rows import IGNORED

# Rows become float32 probabilities this many values at a time: 4 MB.
CHUNK_VALUES = 1 << 20


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −log softmax(logits)[target] over targets that are not IGNORED, float32. **Overwrites `logits`**.

    torch's chain of selection, cast, log-softmax and likelihood holds several copies of the logits, some in
    float32; this holds the one array that came in and turns it into its own gradient. That is softmax −
    one-hot in float32, rounded to the logits' dtype, as in the chain, but before the loss is divided by a
    number of tokens and not after: in bfloat16 one rounding more. Where an earlier operation still needs the
    logits, autograd notices and raises in the backward pass.

    Args:
        logits: (rows, vocabulary).
        targets: (rows,), int64.
    """
    return _SummedCrossEntropy.apply(logits, targets)  # type: ignore[no-any-return, no-untyped-call]


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        rows_at_once = max(1, CHUNK_VALUES // logits.shape[1])
        gradient = logits.detach()  # the same memory
        parts = zip(gradient.split(rows_at_once), targets.split(rows_at_once), strict=True)
        for rows, wanted in parts:
            total -= _chunk(rows, wanted, ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # a second backward would need another forward
        return gradient.mul_(gradients[0]), None


def _chunk(rows: torch.Tensor, wanted: torch.Tensor, needs_gradient: bool) -> torch.Tensor:
    """Σ log p of the wanted tokens; `rows` become the gradient of its negative."""
    counted = wanted != IGNORED
    index = wanted.clamp(min=0)[:, None]
    log_p = torch.log_softmax(rows, dim=1, dtype=torch.float32)
    total = log_p.gather(1, index)[:, 0][counted].sum()
    if needs_gradient:
        gradient = log_p.exp_()
        gradient.scatter_add_(1, index, gradient.new_full((len(wanted), 1), -1.0))
        gradient.mul_(counted[:, None])
        rows.copy_(gradient)
    return total
