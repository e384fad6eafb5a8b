"""Greedy answers of a loaded base model with the adapters that are active, in the form that training used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from edge_sdk.model.base_model import LoadedBase
from edge_sdk.text.rows import prompt_ids

OnText = Callable[[str], None]


@torch.no_grad()
def answers(
    base: LoadedBase, prompts: Sequence[str], max_new_tokens: int, on_text: OnText | None = None
) -> list[str]:
    """One answer to each prompt, as one batch. A long prompt loses its beginning.

    `on_text` hears the answer to a single prompt in pieces of whole words, while it is made.
    """
    tokenizer = base.tokenizer
    room = max(1, (base.max_positions or sys.maxsize) - max_new_tokens)
    rows = [prompt_ids(prompt, tokenizer, room) for prompt in prompts]
    ids, mask = _left_padded(rows, tokenizer.pad_token_id)
    produced = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_end_tokens(base),
        ),
        streamer=None if on_text is None else _Pieces(tokenizer, on_text),
    )
    texts: list[str] = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _end_tokens(base: LoadedBase) -> list[int]:
    """Tokens that end an answer: the tokeniser's eos, and those that the model's own settings name."""
    named = base.model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({int(base.tokenizer.eos_token_id), *map(int, named)})


def _left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts aligned at their end, and the mask of their tokens; both (rows, longest)."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


class _Pieces(TextStreamer):  # type: ignore[misc]  # transformers has no types here
    """Hands an answer on in pieces."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        if text:
            self._on_text(text)
