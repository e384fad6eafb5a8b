"""A device's own text: JSONL records, checked line by line.

One record per line, in one of four forms (a record that has several is read as the first of them):

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}        input may be missing
    {"text": "…"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from edge_sdk.core.errors import InputError

ROLES = ("system", "user", "assistant")
FORMS = "messages; prompt and completion; instruction, output and perhaps input; or text"


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


def _numbered(lines: BinaryIO, path: Path | str) -> Iterator[tuple[str, bytes]]:
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
