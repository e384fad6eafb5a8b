"""Small models of real architectures with random weights, as directories in the Hugging Face form."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Architecture = Literal["gpt2", "llama", "qwen"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "llama", "qwen")

PAD, BOS, EOS, TURN = "<pad>", "<bos>", "<eos>", "<turn>"
TEXT = ["turn the red light on in the kitchen", '{"light": "red", "state": "on"}', "what is the time"] * 4
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)

# Two blocks of width 64 whose key and value projections are (16, 64), so that rank 32 does not fit them all.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser of 300 tokens, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PAD, BOS, EOS, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=128,
        chat_template=chat_template,
    )


def build_model(directory: Path, architecture: Architecture) -> Path:
    """Write a model with seeded random weights and its tokeniser; GPT-2 has no chat template."""
    tokenizer = build_tokenizer(None if architecture == "gpt2" else CHAT_TEMPLATE)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: torch.nn.Module
        if architecture == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=300,
                    n_embd=64,
                    n_layer=2,
                    n_head=4,
                    n_positions=128,
                    initializer_range=0.1,
                    **ids,
                )
            )
        elif architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=True, **SIZES, **ids))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(vocab_size=300, tie_word_embeddings=False, **SIZES, **ids))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_larger_llama(directory: Path) -> Path:
    """Two blocks of width 256 for rows of 512 tokens: a step takes far more than Python itself does."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    changes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "head_dim": 64,
        "max_position_embeddings": 512,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=300, tie_word_embeddings=True, **(SIZES | changes), **ids)
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
