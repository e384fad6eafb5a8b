"""AdamW with moments of 32 or of 8 bits, and its state as plain arrays for a checkpoint.

8-bit moments: Dettmers et al., ICLR 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
Two bytes a value in place of eight; tensors of fewer than 4096 values stay in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_sdk.core.choice.setting import Optimizer

# The names under which the two libraries keep what a moment is made of. `step` is kept apart.
MOMENTS: Mapping[Optimizer, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw8bit": ("state1", "state2", "absmax1", "absmax2"),
}


def build(kind: Optimizer, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> Any:
    """AdamW without weight decay: a penalty on the factors would pull a federation's adapters to zero."""
    if kind == "adamw":
        return torch.optim.AdamW(list(parameters), lr=learning_rate, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(list(parameters), lr=learning_rate, weight_decay=0.0)


def moments(kind: Optimizer, optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, NDArray[Any]]:
    """One parameter's moments; empty before its first step. On a CPU they are views, which a step changes."""
    state = optimizer.state[parameter]
    return {
        name: np.ascontiguousarray(state[name].detach().cpu().numpy())
        for name in MOMENTS[kind]
        if name in state
    }


def restore(
    kind: Optimizer,
    optimizer: Any,
    parameter: torch.nn.Parameter,
    arrays: Mapping[str, NDArray[Any]],
    step: int,
) -> None:
    """Put back what `moments` gave, after `step` steps; on a CPU the arrays are used as they are."""
    tensors = {name: torch.from_numpy(array).to(parameter.device) for name, array in arrays.items()}
    if kind == "adamw":
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **tensors}
        return
    group = optimizer.param_groups[0]
    place = next(i for i, other in enumerate(group["params"]) if other is parameter)
    optimizer.init_state(group, parameter, 0, place)
    optimizer.state[parameter].update({"step": step, **tensors})
