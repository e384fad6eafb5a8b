"""The frozen base model: where it lies, what identifies it, and loading it in 4 bits.

`describe` answers from the configuration and the file digests alone, so that a device learns whether it has
the right base without holding a weight in memory. `load` quantises to NF4 with double quantisation
(Dettmers et al. 2023, arXiv:2305.14314) unless told not to.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from edge_sdk.core.choice.memory import ACCELERATOR, CPU, Placement
from edge_sdk.core.errors import InputError, first_line, one_line
from edge_sdk.core.messages import Base
from edge_sdk.machine.torch_device import compute_dtype, torch_device
from edge_sdk.model.files import (
    file_digests,
    normalised,
    read_config,
    require_no_code,
    resolve,
    tokenizer_files,
    weight_files,
)
from edge_sdk.model.four_bit_layers import keep_trainable
from edge_sdk.system.heap import trim_heap
from edge_sdk.system.hidden_library import BITSANDBYTES
from edge_sdk.system.out_of_memory import means_out_of_memory

ALL_LINEAR = "all-linear"

# What transformers raises where it cannot make a model of a configuration.
UNUSABLE = (ValueError, KeyError, TypeError, OSError, ImportError, ArithmeticError, StrictDataclassError)
Dtype = Literal["auto", "float32", "bfloat16"]

# Loading fewer bytes than this takes about a second at most, so that no bar is shown for it.
QUIET_BYTES = 256 << 20


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory, frozen and in evaluation mode (no dropout, so that training is reproducible).

    `fan_in_fan_out`: whether its blocks hold Conv1D layers, whose weight is (in, out). NF4 replaces these by
    transposed Linear4bit, so that it is true of unquantised GPT-2 alone.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    quantised: bool
    fan_in_fan_out: bool

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model was built for, where its configuration says."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None


# --- identity ------------------------------------------------------------------------------------


def describe(
    model: str,
    targets: str = ALL_LINEAR,
    digests: Path | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """What a federation says of its base model, computed without loading a weight.

    Args:
        model: `tiny`, a directory or a Hugging Face id.
        targets: `all-linear` (every linear layer of the blocks), or names of layers separated by commas.
        digests: file that remembers digests by (path, size, mtime), because 16 GB take a minute to read.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no such model, no configuration that transformers knows, no such target, or code of its
            own that is not trusted.
    """
    directory = resolve(model)
    modules = target_modules(directory, targets, trust_remote_code)
    identity = {
        "config": normalised(read_config(directory)),
        "files": file_digests(tokenizer_files(directory) + weight_files(directory), digests),
        "targets": sorted(modules),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return Base(model, hashlib.sha256(canonical.encode()).hexdigest(), modules)


def configuration(config: Mapping[str, Any]) -> Any:
    """The transformers configuration of a `config.json`.

    Raises:
        InputError: it names no model type that transformers knows, or a value is none that it takes.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError("config.json: model_type is missing; it says which architecture this is")
    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        return AutoConfig.for_model(kind, **values)
    except UNUSABLE as error:
        raise InputError(
            f"config.json: transformers takes no such configuration: {one_line(error)}"
        ) from error


def target_modules(
    directory: Path, targets: str = ALL_LINEAR, trust_remote_code: bool = False
) -> dict[str, tuple[int, int]]:
    """Target module -> (out, in), from the architecture built on the meta device.

    `directory`: of a model, or a bare `config.json`.
    """
    require_no_code(directory, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except UNUSABLE as error:
        raise InputError(f"{directory}: transformers cannot build this model: {one_line(error)}") from error
    linear = block_linears(skeleton)
    if targets == ALL_LINEAR:
        return linear
    names = [name.strip() for name in targets.split(",") if name.strip()]
    for name in names:
        if not any(_ends_with(module, name) for module in linear):
            known = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in linear}))
            raise InputError(f"target {name!r} is no linear layer of {directory.name}; it has {known}")
    return {m: shape for m, shape in linear.items() if any(_ends_with(m, name) for name in names)}


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def block_linears(model: Any) -> dict[str, tuple[int, int]]:
    """Linear layers inside numbered blocks; heads and projections outside them are no targets."""
    shapes = {}
    for name, module in model.named_modules():
        if not re.search(r"\.\d+\.", name) or module is model.get_output_embeddings():
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (int(module.out_features), int(module.in_features))
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            shapes[name] = (int(out_features), int(in_features))
    return shapes


# --- loading -------------------------------------------------------------------------------------


def load(
    model: str,
    device: str = "auto",
    quantise: bool = True,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> LoadedBase:
    """Load a base model and its tokeniser, frozen.

    Args:
        model: `tiny`, a directory or a Hugging Face id.
        device: `auto` (see `machine.torch_device`), `cpu`, `cuda`, `cuda:1`, `mps`.
        quantise: NF4 with double quantisation of the linear layers; otherwise weights stay in `dtype`.
        dtype: of computation and of all that is not quantised. `auto` is bfloat16 where the processor has it.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: no such model or device, a tokeniser without an end-of-text token, or code of its own that
            is not trusted.
    """
    directory = resolve(model)
    require_no_code(directory, trust_remote_code)
    weights = weight_files(directory)
    place = torch_device(device)
    tokenizer = _tokenizer(directory, trust_remote_code)
    compute = compute_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    with _quiet(sum(path.stat().st_size for path in weights) < QUIET_BYTES):
        loaded = _weights(directory, place, compute, quantise, trust_remote_code)
    loaded.eval().requires_grad_(False)
    _let_go_of_files(loaded)
    if quantise:
        keep_trainable(loaded)
    transposed = any(isinstance(module, Conv1D) for module in loaded.modules())
    return LoadedBase(loaded, tokenizer, place, quantise, transposed)


def import_libraries() -> None:
    """Import what `load` and the trainer need, so that what is resident after this is the libraries' own."""
    with _quiet(small=False):
        if importlib.util.find_spec(BITSANDBYTES) is not None:
            import bitsandbytes  # noqa: F401
        import peft  # noqa: F401


def _weights(
    directory: Path, device: torch.device, compute: torch.dtype, quantise: bool, trust_remote_code: bool
) -> Any:
    """The model with every weight of its own: transformers would fill what is missing with random numbers."""
    if importlib.util.find_spec(BITSANDBYTES) is not None:
        import bitsandbytes  # noqa: F401  its first import prints the advice that `_quiet` holds back

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=compute,
            device_map={"": device},
            quantization_config=_nf4(compute) if quantise else None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        if means_out_of_memory(error):
            raise
        raise InputError(f"{directory}: its weights cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{directory}: {len(missing)} weights are missing, {missing[0]} among them")
    return model


def placement(device: str = "auto", quantise: bool = True) -> Placement:
    """How `load` would compute on this device, as the memory estimate needs it."""
    place = torch_device(device)
    compute_bytes = compute_dtype(place).itemsize
    chosen = replace(CPU if place.type == "cpu" else ACCELERATOR, compute_bytes=compute_bytes)
    return chosen if quantise else replace(chosen, weight_bytes=compute_bytes)


def release_memory() -> None:
    """Give memory that nothing refers to back to the machine; torch and glibc would keep it for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
    trim_heap()


def use_threads(count: int) -> None:
    """Let torch compute on this many threads, in the whole process. The caller decides: it is his machine."""
    torch.set_num_threads(count)


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _let_go_of_files(model: Any) -> None:
    """Copy what is not quantised out of the memory-mapped weight file.

    On a CPU those tensors are views into the mapping, and one view keeps the whole file's pages resident.
    """
    copies: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            address = parameter.data_ptr()
            if address not in copies:
                copies[address] = parameter.data.clone()
            parameter.data = copies[address]  # tied weights stay tied


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokeniser beside the weights, with a pad token (eos where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, ImportError) as error:
        raise InputError(f"{directory}: its tokeniser cannot be loaded: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{directory}: its tokeniser has no eos token, so that no answer would ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _quiet(small: bool) -> Iterator[None]:
    """Hold back the weight-loading bar of a small model and the bitsandbytes advice on inference kernels."""
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, bar = advice.level, transformers_logging.is_progress_bar_enabled()
    advice.setLevel(logging.ERROR)
    if small:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        advice.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()
