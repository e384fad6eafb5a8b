"""A device's own text as token rows, with a label on what the model is to learn to say.

The loss is on completions, outputs and assistant turns with their end-of-turn token; on all of a plain text.
Tokenisers are used through the few members that `Tokenizer` names, so that this needs no model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import InputError
from edge_sdk.text.examples import Example, Message, load_examples

__all__ = ["IGNORED", "Batch", "Example", "Message", "Tokenised", "Tokenizer"]
__all__ += ["collate", "load_examples", "prompt_ids", "tokenise"]

IGNORED = -100  # the label that a cross-entropy skips
Tokens = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What this module needs of a Hugging Face tokeniser."""

    bos_token_id: Any
    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """A mapping whose `input_ids` are the tokens of `text`."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """A conversation as the text that the model knows."""


@dataclass(frozen=True)
class Tokenised:
    """One training row. `labels[i]` is `ids[i]`, or IGNORED where nothing is to be learnt (not shifted)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def label_tokens(self) -> int:
        """Tokens that the loss counts; the first token of a row has nothing before it to predict it."""
        return sum(label != IGNORED for label in self.labels[1:])


class Batch(NamedTuple):
    """Right-padded rows, each (rows, longest) of int64; `mask` is 1 on tokens and 0 on padding."""

    ids: Tokens
    mask: Tokens
    labels: Tokens


def tokenise(example: Example, tokenizer: Tokenizer, sequence_len: int) -> Tokenised:
    r"""Token row of an example, at most `sequence_len` tokens, with at least one label that counts.

    With a chat template, the template decides the form. Without one, every turn is tokenised apart:
    `{content}\n` for system and user, `{content}{eos}` for the assistant. A row too long loses the oldest
    part of its prompt first (never bos), then the end of its last completion.

    Raises:
        InputError: the template refuses the conversation, or nothing is left to learn from.
    """
    if sequence_len < 2:
        raise InputError(f"sequence_len is {sequence_len}; a row needs at least 2 tokens")
    if example.text is not None:
        ids, spans = _plain_text(example.text, tokenizer)
    elif tokenizer.chat_template:
        ids, spans = _by_template(example, tokenizer)
    else:
        ids, spans = _by_turns(example.messages, tokenizer)
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        labels[begin:end] = ids[begin:end]
    row = _cut(ids, labels, spans[-1][0] if spans else 0, tokenizer, sequence_len)
    if not row.label_tokens:
        raise InputError(
            f"{example.where or 'example'}: too short to learn from: no token of it can be predicted"
        )
    return row


def prompt_ids(prompt: str, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    """Tokens after which the model is to answer `prompt`, in the form that `tokenise` trains on."""
    if tokenizer.chat_template:
        text = _render([Message("user", prompt)], tokenizer, generation_prompt=True)
        ids = _encode(text, tokenizer)
    else:
        ids = [*_bos(tokenizer), *_encode(prompt + "\n", tokenizer)]
    excess = max(0, len(ids) - max_tokens)
    kept = len(_leading_bos(ids, tokenizer))
    return ids[:kept] + ids[kept + excess :]


def _plain_text(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """All of a text, between bos and eos where the tokeniser has them."""
    ids = [*_bos(tokenizer), *_encode(text, tokenizer), *_eos(tokenizer)]
    return ids, [(0, len(ids))]


def _by_turns(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Turns tokenised apart, so that a prompt has the same tokens here as when the model is asked."""
    ids = _bos(tokenizer)
    spans = []
    for message in messages:
        if message.role == "assistant":
            turn = [*_encode(message.content, tokenizer), *_eos(tokenizer)]
            spans.append((len(ids), len(ids) + len(turn)))
        else:
            turn = _encode(message.content + "\n", tokenizer)
        ids = ids + turn
    return ids, spans


def _by_template(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """The rendered conversation and the token span of each assistant turn.

    A turn begins where the rendering of the turns before it (with the template's generation prompt, else
    without) stops, and ends where the rendering of the turns up to it stops; both must be beginnings of the
    whole. Some templates rewrite a turn once others follow (they drop its reasoning): such a turn is not
    what the model would have said, and carries no loss.
    """
    messages = example.messages
    whole = _render(messages, tokenizer, where=example.where)
    ids = _encode(whole, tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        end = whole if index + 1 == len(messages) else _render(messages[: index + 1], tokenizer)
        begins = (_render(messages[:index], tokenizer, generation_prompt=g) for g in (True, False) if index)
        begin = next((text for text in begins if whole.startswith(text)), None if index else "")
        if begin is not None and whole.startswith(end):
            span = _shared(_encode(begin, tokenizer), ids), _shared(_encode(end, tokenizer), ids)
            spans.append(span)
    if not spans:
        raise InputError(
            f"{example.where or 'example'}: the model's chat template rewrites the turns before the last "
            "answer, so that its tokens cannot be told apart; use prompt and completion"
        )
    return ids, spans


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool = False, where: str = ""
) -> str:
    """The conversation as text. Templates that know `enable_thinking` (Qwen3) are told to answer directly."""
    from jinja2 import TemplateError  # comes with every tokeniser that has a template

    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation_prompt, enable_thinking=False
        )
    except TemplateError as error:
        raise InputError(f"{where or 'example'}: the model's chat template refuses it: {error}") from error
    return text


def _shared(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the common beginning: a token that crosses the edge belongs to what comes after."""
    pairs = zip(prefix, ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(ids)))


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _eos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _leading_bos(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """bos, if the row begins with it."""
    bos = _bos(tokenizer)
    return bos if list(ids[:1]) == bos else []


def _cut(
    ids: list[int], labels: list[int], last_span: int, tokenizer: Tokenizer, sequence_len: int
) -> Tokenised:
    """Drop what is over `sequence_len`: from the left up to the last labelled span, then from the right."""
    kept = len(_leading_bos(ids, tokenizer))
    excess = min(max(0, len(ids) - sequence_len), max(0, last_span - kept))
    ids = (ids[:kept] + ids[kept + excess :])[:sequence_len]
    labels = (labels[:kept] + labels[kept + excess :])[:sequence_len]
    return Tokenised(tuple(ids), tuple(labels))


def collate(rows: Sequence[Tokenised], pad_id: int) -> Batch:
    """Rows as right-padded arrays, in the order given."""
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        mask[index, : len(row.ids)] = 1
        labels[index, : len(row.ids)] = row.labels
    return Batch(ids, mask, labels)
