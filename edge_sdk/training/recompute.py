"""Activation checkpointing: a block's activations are computed again in the backward pass, not kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. Only each block's input
is kept. transformers does this in training mode alone, which would switch dropout on; a frozen base trains
in evaluation mode here, so the blocks are wrapped from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from edge_sdk.core.errors import InputError


@contextmanager
def recomputed(model: Any, on: bool) -> Iterator[None]:
    """Within this context every block of `model` recomputes its activations, if `on`.

    Raises:
        InputError: the architecture does not say which modules its blocks are.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if on and not blocks:
        raise InputError(f"{type(model).__name__} has no blocks that could be recomputed; turn that off")
    for block in blocks if on else []:
        # No random state to keep: nothing is dropped out.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks if on else []:
            del block.forward  # the class has the plain one
