"""What a memory estimate needs to know of a base model, from its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import InputError

Shapes = Mapping[str, tuple[int, int]]
"""Target module -> (out, in)."""


@dataclass(frozen=True)
class ModelFacts:
    """What the estimate needs to know of a base model. Widths are values per token."""

    shapes: Shapes  # LoRA targets of the whole model
    linear_parameters: int  # quantised to 4 bits: the linear layers inside the blocks
    other_parameters: int  # not quantised: embeddings, norms, a head of its own (biases are left out)
    hidden: int
    layers: int
    intermediate: int
    heads: int
    query_width: int  # heads · head size
    key_value_width: int  # key-value heads · head size
    mlp_tensors: int  # of width `intermediate` kept between the MLP's linear layers
    vocab: int
    norms_in_float32: bool = True  # RMS norms of transformers compute on a float32 copy; layer norms do not
    head_norms: bool = False  # of query and key, as in Qwen 3

    def adapter_values(self, rank: int | Ranks) -> int:
        """Values in an adapter of `rank`; a module narrower than that holds min(out, in) components."""
        ranks = Ranks.uniform(rank) if isinstance(rank, int) and rank else rank
        if not isinstance(ranks, Ranks):
            return 0
        return sum(min(ranks.of(name), o, i) * (o + i) for name, (o, i) in self.shapes.items())

    def largest_rank(self) -> tuple[str, int]:
        """The module with room for the largest rank, and that rank."""
        name = max(self.shapes, key=lambda module: min(self.shapes[module]))
        return name, min(self.shapes[name])


def facts_from_config(config: Mapping[str, Any], shapes: Shapes) -> ModelFacts:
    """Facts from a `config.json` with the keys of Llama, Qwen and Mistral, or of GPT-2.

    `shapes`: target module -> (out, in). An absent `tie_word_embeddings` counts as a head of its own, but for
    GPT-2.

    Raises:
        InputError: a key is missing or no positive integer, or the model is a mixture of experts.
    """
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise InputError(f"config.json: {key} is set; mixture-of-experts models are not supported")
    return _gpt2_facts(config, shapes) if "n_embd" in config else _llama_facts(config, shapes)


def _llama_facts(config: Mapping[str, Any], shapes: Shapes) -> ModelFacts:
    """Gated MLP, RMS norms, grouped key-value heads."""
    hidden, layers = _positive(config, "hidden_size"), _positive(config, "num_hidden_layers")
    intermediate, vocab = _positive(config, "intermediate_size"), _positive(config, "vocab_size")
    heads = _positive(config, "num_attention_heads")
    head_size = _positive(config, "head_dim", hidden // heads)
    query, key_value = heads * head_size, _positive(config, "num_key_value_heads", heads) * head_size
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    return ModelFacts(
        shapes=dict(shapes),
        linear_parameters=layers * hidden * (2 * query + 2 * key_value + 3 * intermediate),
        other_parameters=tables * vocab * hidden + (2 * layers + 1) * hidden,
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=heads,
        query_width=query,
        key_value_width=key_value,
        mlp_tensors=3,  # gate, its SiLU, up
        vocab=vocab,
        head_norms=str(config.get("model_type", "")).startswith("qwen3"),
    )


def _gpt2_facts(config: Mapping[str, Any], shapes: Shapes) -> ModelFacts:
    """Plain MLP with the tanh GELU, layer norms with biases, learnt positions."""
    hidden, layers, vocab = (_positive(config, key) for key in ("n_embd", "n_layer", "vocab_size"))
    intermediate = _positive(config, "n_inner", 4 * hidden)
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    positions = _positive(config, "n_positions")
    return ModelFacts(
        shapes=dict(shapes),
        linear_parameters=layers * hidden * (4 * hidden + 2 * intermediate),
        other_parameters=(tables * vocab + positions + 2 * (2 * layers + 1)) * hidden,
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=_positive(config, "n_head"),
        query_width=hidden,
        key_value_width=hidden,
        mlp_tensors=4,  # x, x/2, tanh and 1 + tanh
        vocab=vocab,
        norms_in_float32=False,
    )


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the configuration; null counts as absent."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config.json: {key} is missing; the memory estimate needs it")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value
