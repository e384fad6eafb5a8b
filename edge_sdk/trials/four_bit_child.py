"""A trial of 4-bit training on one device: quantise, forward and backward, against the same in float32.

`python -m edge_sdk.trials.four_bit_child DEVICE` runs it; `four_bit` does that in a process of its own,
because a wheel built for another processor does not raise an error but kills the process (SIGILL, SIGSEGV).
Needs torch and bitsandbytes, and imports nothing of transformers.
"""

from __future__ import annotations

import json
import logging
import sys
from itertools import pairwise
from typing import Any

import torch

from edge_sdk.core.errors import InputError
from edge_sdk.machine.torch_device import compute_dtype, torch_device
from edge_sdk.model.four_bit_layers import keep_trainable

IMPORTED = "bitsandbytes was imported"  # a line of the child: whatever fails after it is a kernel
WIDTHS = (256, 128, 192)  # in -> hidden -> out; the second weight needs a partial block of constants
ROWS, RANK = 6, 4

# Relative (Frobenius) distance of a 4-bit layer's result from float32 arithmetic on the same dequantised
# weights. Measured on an AVX512-BF16 CPU: 0.0034 at most in bfloat16, 0 in float32. A wrong kernel is wrong
# by the whole size of its result.
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 0.005}
# NF4 of normal weights is 0.09 away from them (16 levels, blocks of 64); noise or zeros are 1 or more away.
QUANTISED_WITHIN = 0.15


def trial(name: str) -> str:
    """Train one step through two 4-bit layers with LoRA on the first.

    Returns:
        What disagrees, or an empty text where all is well.

    Raises:
        InputError: torch has no such device. Anything else that bitsandbytes raises passes through.
    """
    device = torch_device(name)
    dtype = compute_dtype(device)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(o, i, generator=generator) / i**0.5 for i, o in pairwise(WIDTHS)]
    layers = torch.nn.ModuleList(four_bit_layer(weight, device, dtype) for weight in exact).eval()
    keep_trainable(layers)
    weights = [dequantised(layer) for layer in layers]
    for wanted, found in zip(exact, weights, strict=True):
        if _distance(found.cpu(), wanted) > QUANTISED_WITHIN:
            return f"weights come back {_distance(found.cpu(), wanted):.2f} away from what was quantised"
    leaves = [
        torch.randn(shape, generator=generator).to(device)
        for shape in ((ROWS, WIDTHS[0]), (RANK, WIDTHS[0]), (WIDTHS[1], RANK), (ROWS, WIDTHS[2]))
    ]
    row = leaves[0][:1]
    # One row without a gradient, as text is generated, and before the step: training must work after it.
    quantised = {"the product of one row": layers[0](row.to(dtype)).float()}
    quantised |= _step(leaves, lambda x, k: layers[k](x.to(dtype)).float())
    reference = {"the product of one row": row @ weights[0].T}
    reference |= _step(leaves, lambda x, k: x @ weights[k].T)
    for what, wanted in reference.items():
        distance = _distance(quantised[what].detach(), wanted.detach())
        if not distance <= TOLERANCE[dtype]:  # NaN is not within it either
            return f"{what} is {distance:.2g} away from float32, more than {TOLERANCE[dtype]:g}"
    return ""


def four_bit_layer(weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Any:
    """A linear layer of this weight (out, in), quantised on `device` as the loader does it."""
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    return layer.to(device)


def dequantised(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer stands for, (out, in) in float32."""
    import bitsandbytes as bnb

    weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.detach().float()


def _step(leaves: list[torch.Tensor], linear: Any) -> dict[str, torch.Tensor]:
    """Forward and backward of `linear(linear(x) + lora(x))`: the result and the gradients."""
    x, a, b = (leaf.clone().requires_grad_(True) for leaf in leaves[:3])
    hidden = linear(x, 0) + x @ a.T @ b.T / WIDTHS[0]
    result = linear(hidden, 1)
    (result * leaves[3]).sum().backward()
    found = {"the product": result}
    for what, leaf in (("input", x), ("LoRA A", a), ("LoRA B", b)):
        found[f"the gradient of {what}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return float((found - wanted).norm() / wanted.norm())


def main() -> int:
    """Run the trial in this process; the last line of output is a JSON object with what disagrees."""
    logging.disable(logging.WARNING)  # bitsandbytes' advice on inference kernels
    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401  a wheel may fail here already

    sys.stdout.write(IMPORTED + "\n")
    sys.stdout.flush()
    try:
        wrong = trial(sys.argv[1])
    except InputError as error:
        wrong = str(error)
    sys.stdout.write(json.dumps({"wrong": wrong}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
