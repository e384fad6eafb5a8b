"""A base model cut down to a few of its blocks, made from its configuration alone.

The blocks have the real shapes and, where asked, the real 4-bit layers. The weights are of no use, but finite
and of the usual size, so that nothing is slower or faster than with real ones. They repeat a short pattern,
because drawing and quantising 200 million values would take ten seconds and they would train no faster.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from edge_sdk.core.choice.model_facts import ModelFacts, Shapes, facts_from_config
from edge_sdk.core.errors import InputError, one_line
from edge_sdk.machine.torch_device import compute_dtype, torch_device
from edge_sdk.model import base_model
from edge_sdk.model.four_bit_layers import keep_trainable

VOCAB = 512
PATTERN = 1 << 18  # values: a whole number of NF4's blocks of 64 and of their groups of 256
LARGEST_VALUE = 0.02


def cut_down(
    config: Mapping[str, Any], layers: int, device: str = "auto", quantise: bool = True
) -> tuple[base_model.LoadedBase, ModelFacts]:
    """The model as `base_model.load` would give it, but short and without a tokeniser; and its facts.

    Raises:
        InputError: transformers knows no such model, or this machine has no such device.
    """
    place = torch_device(device)
    compute = compute_dtype(place)
    model = _skeleton(config, layers)
    shapes = base_model.block_linears(model)
    if quantise:
        _quantise(model, shapes, place, compute)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = filled(parameter.shape, place, compute)
            module, _, last = name.rpartition(".")
            setattr(model.get_submodule(module), last, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.to(place)  # the buffers
    model.eval().requires_grad_(False)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    base = base_model.LoadedBase(model, SimpleNamespace(pad_token_id=0), place, quantise, transposed)
    return base, facts_from_config(model.config.to_dict(), shapes)


def filled(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Small random values that repeat."""
    count = int(torch.Size(shape).numel())
    pattern = _pattern(device).to(dtype)
    return pattern.repeat(-(-count // PATTERN))[:count].view(shape).clone()


@functools.lru_cache(maxsize=1)
def _pattern(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return ((torch.rand(PATTERN, generator=generator) * 2 - 1) * LARGEST_VALUE).to(device)


def _skeleton(config: Mapping[str, Any], layers: int) -> Any:
    """The architecture with `layers` blocks: parameters on the meta device, buffers real."""
    built = base_model.configuration(config)
    text = built.get_text_config()
    text.num_hidden_layers, text.vocab_size = layers, min(VOCAB, text.vocab_size)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)  # they lie outside the small vocabulary
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(built, trust_remote_code=False)
    except base_model.UNUSABLE as error:
        raise InputError(f"config.json: transformers cannot build this model: {one_line(error)}") from error


def _quantise(model: Any, shapes: Shapes, device: torch.device, compute: torch.dtype) -> None:
    """Put 4-bit layers in the places of the blocks' linear layers."""
    for name, (out_features, in_features) in shapes.items():
        old = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        layer = _four_bit(out_features, in_features, device, compute)
        layer.bias = old.bias  # still on the meta device
        setattr(model.get_submodule(parent), last, layer)
    model.is_loaded_in_4bit = True  # how PEFT tells
    keep_trainable(model)


def _four_bit(out_features: int, in_features: int, device: torch.device, compute: torch.dtype) -> Any:
    """An NF4 layer with double quantisation whose packed weight repeats that of the pattern."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        _pattern(device).to(compute), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    values = out_features * in_features
    blocks = -(-values // state.blocksize)
    groups = -(-blocks // state.state2.blocksize)
    state.shape = torch.Size((out_features, in_features))
    state.absmax = _repeated(state.absmax, blocks)
    state.state2.absmax = _repeated(state.state2.absmax, groups)
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=False,
        compute_dtype=compute,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        _repeated(packed.flatten(), -(-values // 2))[:, None],
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer


def _repeated(values: torch.Tensor, count: int) -> torch.Tensor:
    """`count` values that begin with `values` again and again."""
    return values.repeat(-(-count // len(values)))[:count].clone()
