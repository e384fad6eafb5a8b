"""Activation checkpointing: a block's activations are computed again in the backward pass, not kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. Only each block's input
is kept. transformers does this in training mode alone, which would switch dropout on; a frozen base trains
in evaluation mode here, so the blocks are wrapped from outside.

What that saves would stay with the heap of glibc, which `tight_heap` keeps from it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from edge_sdk.core.errors import InputError

M_MMAP_THRESHOLD = -3  # of <malloc.h>

# Blocks from this size on come from the system one by one and go back the moment they are freed.
TIGHT_BYTES = 256 << 10
LOOSE_BYTES = 32 << 20  # the highest that glibc accepts; it gets there by itself in a process that trains


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


@contextmanager
def tight_heap(on: bool) -> Iterator[None]:
    """Within this context the process holds little more than what is allocated, if `on`.

    Recomputation frees a block's activations and keeps its small input. glibc puts that input into the hole
    that the large tensors left, so that those of the next block find no room there and the heap grows as if
    nothing had been freed: a GPT-2 of 124M parameters on 2 × 512 tokens held 395 MB more than it had
    allocated, all that recomputation should have saved. The price of a tight heap is pages that the kernel
    clears again and again: steps of about 1.6 times the time. It is for those whose memory is short.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if on and sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, TIGHT_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LOOSE_BYTES)
