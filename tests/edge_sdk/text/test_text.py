"""Records to token rows: every form, every kind of bad line, label spans, cutting, padding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from edge_sdk.text.examples import Example, Message, load_examples, parse_record
from edge_sdk.text.rows import IGNORED, Tokenised, collate, prompt_ids, tokenise
from tests.models import build_tokenizer

WITH_TEMPLATE = build_tokenizer()
WITHOUT = build_tokenizer(None)
BOS, EOS = 1, 2


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def labelled(row: Tokenised, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


def test_the_four_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "notes.jsonl",
        '{"prompt": "p", "completion": "c"}',
        "",
        '{"instruction": "i", "input": "x", "output": "o"}',
        '{"instruction": "i", "input": null, "output": "o"}',
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},'
        ' {"role": "assistant", "content": "a"}, {"role": "user", "content": "left out"}]}',
        '{"text": "plain", "id": 7}',
    )
    user, assistant = "user", "assistant"
    assert load_examples(path) == [
        Example((Message(user, "p"), Message(assistant, "c"))),
        Example((Message(user, "i\n\nx"), Message(assistant, "o"))),
        Example((Message(user, "i"), Message(assistant, "o"))),
        Example((Message("system", "s"), Message(user, "u"), Message(assistant, "a"))),
        Example(text="plain"),
    ]
    assert [e.where.rsplit(":")[-1] for e in load_examples(path)] == ["1", "3", "4", "5", "6"]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "bom.jsonl", b'\xef\xbb\xbf{"text": "one"}\r', '{"text": "two\u2028three"}\r')
    assert [e.text for e in load_examples(path)] == ["one", "two\u2028three"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["a"]', "not an object"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 14 of the line)"),
        (b'{"question": "q"}', "expected messages; prompt and completion; instruction"),
        (b'{"prompt": "p"}', "found prompt"),
        (b"{}", "found nothing"),
        (b'{"prompt": "p", "completion": 3}', "'completion' is a JSON int, not a string"),
        (b'{"prompt": null, "completion": "c"}', "'prompt' is null"),
        (b'{"prompt": "p", "completion": "  "}', "'completion' is empty"),
        (b'{"text": " "}', "'text' is empty"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"messages": "hi"}', "'messages' is a JSON str, not a list"),
        (b'{"messages": ["hi"]}', "messages[0] is not an object"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "role 'tool'; use system, user, assistant"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": ["x"]}]}', "'content' is a JSON list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    path = write(tmp_path / "bad.jsonl", '{"text": "fine"}', line)
    with pytest.raises(InputError) as caught:
        load_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert says in message
    assert "\n" not in message


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_examples(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="holds no records"):
        load_examples(write(tmp_path / "empty.jsonl", "", "  "))
    with pytest.raises(InputError, match="cannot be read"):
        load_examples(tmp_path)


def test_without_a_template_turns_are_tokenised_apart() -> None:
    row = tokenise(parse_record({"prompt": "the light", "completion": "on"}), WITHOUT, 64)
    prompt = [BOS, *WITHOUT("the light\n", add_special_tokens=False)["input_ids"]]
    completion = [*WITHOUT("on", add_special_tokens=False)["input_ids"], EOS]
    assert row.ids == (*prompt, *completion)
    assert row.labels == (*[IGNORED] * len(prompt), *completion)
    assert row.label_tokens == len(completion)
    assert prompt_ids("the light", WITHOUT, 64) == prompt


def test_with_a_template_each_assistant_turn_is_learnt_with_its_end() -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")]
    example = parse_record({"messages": [{"role": r, "content": c} for r, c in turns]})
    row = tokenise(example, WITH_TEMPLATE, 128)
    whole = (
        "<bos><turn>system\ns<eos><turn>user\na<eos><turn>assistant\nb c<eos>"
        "<turn>user\nd<eos><turn>assistant\ne<eos>"
    )
    assert WITH_TEMPLATE.decode(row.ids) == whole
    assert labelled(row, WITH_TEMPLATE) == "b c<eos>e<eos>"


def test_a_prompt_is_asked_in_the_form_that_was_trained() -> None:
    row = tokenise(parse_record({"prompt": "red", "completion": "on"}), WITH_TEMPLATE, 64)
    asked = prompt_ids("red", WITH_TEMPLATE, 64)
    assert list(row.ids[: len(asked)]) == asked
    assert row.labels[len(asked) - 1 : len(asked) + 1] == (IGNORED, row.ids[len(asked)])


def test_turns_that_the_template_rewrites_carry_no_loss() -> None:
    """As Qwen3's: an answer is shown with its reasoning while it is the last, and without it later."""
    template = (
        "{% for m in messages %}<turn>{% if m['role'] == 'assistant' and loop.last %}[think]{% endif %}"
        "{{ m['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
    )
    tokenizer = build_tokenizer(template)
    messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = tokenise(
        parse_record({"messages": [{"role": r, "content": c} for r, c in messages]}), tokenizer, 64
    )
    assert labelled(row, tokenizer) == "[think]d<eos>"


def test_templates_that_cannot_serve_are_refused_by_line() -> None:
    example = Example((Message("user", "a"), Message("assistant", "b")), where="notes.jsonl:4")
    backwards = build_tokenizer("{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(InputError, match="^notes.jsonl:4: the model's chat template rewrites"):
        tokenise(example, backwards, 64)
    refusing = build_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="^notes.jsonl:4: .* refuses it: no system role"):
        tokenise(example, refusing, 64)


def test_plain_text_is_learnt_whole() -> None:
    row = tokenise(Example(text="the time"), WITH_TEMPLATE, 64)
    assert row.ids == (BOS, *WITH_TEMPLATE("the time", add_special_tokens=False)["input_ids"], EOS)
    assert row.labels == row.ids
    assert row.label_tokens == len(row.ids) - 1


def test_a_long_row_loses_the_start_of_its_prompt_then_the_end_of_its_completion() -> None:
    example = parse_record({"prompt": "w" * 50 + "xyz", "completion": "0123456789"})
    whole = tokenise(example, WITHOUT, 128)
    short = tokenise(example, WITHOUT, 20)
    assert short.ids == (BOS, *whole.ids[-19:])
    assert labelled(short, WITHOUT) == "0123456789<eos>"
    tight = tokenise(example, WITHOUT, 6)
    assert WITHOUT.decode(tight.ids) == "<bos>01234"
    assert prompt_ids("w" * 50 + "xyz", WITHOUT, 5) == [BOS, *whole.ids[-15:-11]]


@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user"]), st.text(max_size=30), st.text("ab c", min_size=1))
    ),
    st.integers(2, 40),
    st.booleans(),
)
def test_every_row_fits_and_teaches_something(
    turns: list[tuple[str, str, str]], length: int, template: bool
) -> None:
    messages = [m for role, said, answer in turns for m in ((role, said), ("assistant", answer + "z"))]
    messages = messages or [("assistant", "z")]
    tokenizer = WITH_TEMPLATE if template else WITHOUT
    try:
        example = parse_record({"messages": [{"role": r, "content": c} for r, c in messages]})
    except InputError as error:
        assert "surrogate" in str(error)
        return
    row = tokenise(example, tokenizer, length)
    assert 2 <= len(row.ids) <= length
    assert len(row.labels) == len(row.ids)
    assert row.label_tokens >= 1
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))


def test_a_row_that_can_teach_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="sequence_len is 1"):
        tokenise(Example(text="x"), WITHOUT, 1)
    bare = build_tokenizer(None)
    bare.bos_token = None
    bare.eos_token = None
    with pytest.raises(InputError, match="^notes.jsonl:1: too short to learn from"):
        tokenise(Example(text="x", where="notes.jsonl:1"), bare, 8)


def test_collate_pads_on_the_right_in_the_order_given() -> None:
    batch = collate([Tokenised((5,), (IGNORED,)), Tokenised((6, 7, 8), (IGNORED, 7, 8))], pad_id=0)
    assert batch.ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert batch.mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED] * 3, [IGNORED, 7, 8]]


def test_reading_data_loads_no_model_code() -> None:
    code = "import edge_sdk.text.rows, sys; print(*({'torch', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == ""


def test_every_utf8_text_survives(tmp_path: Path) -> None:
    text = "naïve café — 日本語 🙂"
    path = write(
        tmp_path / "u.jsonl", json.dumps({"text": text}), json.dumps({"text": text}, ensure_ascii=False)
    )
    rows = [tokenise(e, WITHOUT, 128) for e in load_examples(path)]
    assert rows[0] == rows[1]
    assert WITHOUT.decode(rows[0].ids, skip_special_tokens=True) == text
