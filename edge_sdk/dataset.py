"""A device's own text: JSONL records to token rows with a label on what the model is to learn to say.

One record per line, in one of four forms (a record that has several is read as the first of them):

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}        input may be missing
    {"text": "…"}

The loss is on completions, outputs and assistant turns with their end-of-turn token; on all of a plain text.
Tokenisers are used through the few members that `Tokenizer` names, so that reading data needs no model code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.core.errors import InputError

IGNORED = -100  # the label that a cross-entropy skips
ROLES = ("system", "user", "assistant")
FORMS = "messages; prompt and completion; instruction, output and perhaps input; or text"
Tokens = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What this module needs of a Hugging Face tokeniser."""

    bos_token_id: Any
    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """One record: a conversation that holds an assistant turn, or a plain text. `where` is its file:line."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    where: str = field(default="", compare=False)


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


# --- reading -------------------------------------------------------------------------------------


def load_examples(path: Path | str) -> list[Example]:
    """Read a JSONL file. Blank lines are skipped; a byte order mark is not minded.

    Raises:
        InputError: no such file, no records, not UTF-8, or a line that is no usable record; names file:line.
    """
    try:
        with Path(path).open("rb") as lines:
            examples = [parse_line(line, where) for where, line in _numbered(lines, path)]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; name a JSONL file of {FORMS}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not examples:
        raise InputError(f"{path}: holds no records; put one JSON object on each line, of {FORMS}")
    return examples


def _numbered(lines: Any, path: Path | str) -> Iterator[tuple[str, bytes]]:
    """Yield (file:line, bytes) for every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        stripped = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if stripped:
            yield f"{path}:{number}", stripped


def parse_line(line: bytes, where: str = "record") -> Example:
    """One JSONL line as an example.

    Raises:
        InputError: names `where`.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
        raise InputError(f"{where}: not JSON ({reason}); each line is one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a JSON {type(record).__name__}, not an object; each line is one JSON object"
        )
    return parse_record(record, where)


def parse_record(record: Mapping[str, Any], where: str = "record") -> Example:
    """A decoded record as an example.

    Raises:
        InputError: names `where` and the field.
    """
    if "messages" in record:
        return Example(_messages(record["messages"], where), where=where)
    if "prompt" in record and "completion" in record:
        return _pair(
            _string(record, "prompt", where), _string(record, "completion", where), "completion", where
        )
    if "instruction" in record and "output" in record:
        prompt = _string(record, "instruction", where)
        extra = _string(record, "input", where) if record.get("input") is not None else ""
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
        return _pair(prompt, _string(record, "output", where), "output", where)
    if "text" in record:
        text = _string(record, "text", where)
        if not text.strip():
            raise InputError(f"{where}: 'text' is empty")
        return Example(text=text, where=where)
    found = ", ".join(sorted(map(str, record)))[:80] or "nothing"
    raise InputError(f"{where}: no usable text; expected {FORMS}, found {found}")


def _pair(prompt: str, completion: str, key: str, where: str) -> Example:
    """A prompt and its completion as two messages."""
    if not completion.strip():
        raise InputError(f"{where}: '{key}' is empty, so that there is nothing to learn")
    return Example((Message("user", prompt), Message("assistant", completion)), where=where)


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    """A field that must be text."""
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: '{key}' is {_kind_of(value)}, not a string")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: '{key}' holds half of a surrogate pair, which is not text")
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    """The turns of a conversation, up to its last assistant turn (nothing after that is learnt)."""
    if not isinstance(value, list):
        raise InputError(f"{where}: 'messages' is {_kind_of(value)}, not a list")
    turns: list[Message] = []
    last = 0
    for index, item in enumerate(value):
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            raise InputError(f"{where}: messages[{index}] is not an object with 'role' and 'content'")
        role = item["role"]
        if role not in ROLES:
            raise InputError(
                f"{where}: messages[{index}] has role {str(role)[:40]!r}; use {', '.join(ROLES)}"
            )
        turns.append(Message(role, _string(item, "content", f"{where}: messages[{index}]")))
        if role == "assistant" and item["content"].strip():
            last = index + 1
    if not last:
        raise InputError(
            f"{where}: 'messages' has no assistant turn with text, so that there is nothing to learn"
        )
    return tuple(turns[:last])


def _kind_of(value: Any) -> str:
    """A short name for a JSON value."""
    return "null" if value is None else f"a JSON {type(value).__name__}"


# --- tokens --------------------------------------------------------------------------------------


def tokenise(example: Example, tokenizer: Tokenizer, sequence_len: int) -> Tokenised:
    """Token row of an example, at most `sequence_len` tokens, with at least one label that counts.

    With a chat template, the template decides the form. Without one, every turn is tokenised apart:
    `{content}\\n` for system and user, `{content}{eos}` for the assistant. A row too long loses the oldest
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
            f"{example.where or 'example'}: the model's chat template rewrites the turns before the last answer, "
            "so that its tokens cannot be told apart; use prompt and completion"
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
