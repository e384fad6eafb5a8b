"""The decoder against the one written by hand: the same verdict, and the same value, on whatever comes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.records import naive
from edge_sdk.core import messages
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import ProtocolError
from edge_sdk.core.records import decode, encode, from_json, to_json
from edge_sdk.membership.session import Session
from tests.edge_sdk.core import strategies
from tests.edge_sdk.core.test_records import RECORDS, Inner, Sample

KINDS = [*RECORDS, Session, Inner, Sample]

TOP = 2**1024 - 2**970  # the least integer that rounds to no float
numbers = st.sampled_from([True, False, 0, -1, 1.0, -0.0, 5e-324, math.nan, math.inf, -math.inf]) | (
    st.sampled_from([2**53 + 1, 2**63, 2**64, -(2**64), 2**1023, -(2**1023), TOP - 1, TOP, 10**400, 10**4200])
)
texts = st.sampled_from(["", "a", "\x00", "é", "\ud800", "a\udfffb", "\ud83d\ude00", "continue", "carry"])
leaves = st.none() | numbers | texts | st.integers() | st.floats() | st.text()
hostile = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.text(), inner, max_size=3),
    max_leaves=6,
)


def arrays_as_lists(value: Any) -> Any:
    """As `json.loads` gives it."""
    return json.loads(json.dumps(value))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    if isinstance(value, dict | list):
        for at in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, at
            yield from places(value[at])


@st.composite
def spoilt(draw: st.DrawFn, kind: type[Any]) -> Any:
    """A record of this kind as JSON, in which one to three places were changed, removed or added to."""
    value = arrays_as_lists(to_json(draw(st.from_type(kind).filter(encodable))))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            return value
        within, at = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                within[at] = draw(hostile)
            case "remove":
                del within[at]
            case "add" if isinstance(within, dict):
                within[draw(st.text())] = draw(hostile)
            case "add":
                within.append(draw(hostile))
    return value


def encodable(record: Any) -> bool:
    try:
        json.dumps(to_json(record), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def verdict(read: Any, *arguments: Any) -> str:
    """What came out, to the last bit and type; or that nothing did."""
    try:
        return repr(read(*arguments))
    except (ProtocolError, ValueError, RecursionError) as error:
        assert isinstance(error, ProtocolError) or read is not from_json
        return "refused"


def naive_decode(kind: type[Any], text: str) -> Any:
    return naive.from_json(kind, json.loads(text))


for part in (Ranks, Setting):
    st.register_type_strategy(part, strategies.record(part))
st.register_type_strategy(Session, strategies.record(Session, phase="idle"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_the_same_verdict_on_values_and_on_text(kind: type[Any], data: st.DataObject) -> None:
    value = data.draw(spoilt(kind) | hostile)
    expected = verdict(naive.from_json, kind, value)
    assert verdict(from_json, kind, value) == expected
    text = json.dumps(value)
    assert verdict(decode, kind, text) == verdict(naive_decode, kind, text) == expected
    assert verdict(decode, kind, text.encode()) == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_the_same_values_are_written(kind: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(kind).filter(encodable))
    assert repr(to_json(record)) == repr(naive.to_json(record))
    assert json.loads(encode(record)) == json.loads(json.dumps(naive.to_json(record)))
    assert decode(kind, encode(record)) == record
    assert json.loads(encode(record, indent=1)) == json.loads(encode(record))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        '{"share": 1e400}',
        '{"share": -1e400}',
        '{"other": 1e400}',
        '{"share": NaN}',
        '{"other": NaN}',
        '{"maybe": Infinity}',
        '{"count": 1e2}',
        '{"count": -0, "share": -0}',
        f'{{"share": 1{"0" * 308}}}',
        f'{{"share": 1{"0" * 309}}}',
        f'{{"share": 1{"0" * 5000}}}',
        f'{{"count": 1{"0" * 4000}}}',
        f'{{"count": 1{"0" * 5000}}}',
        '{"count": 1, "count": 2}',
        '{"count": "x", "count": 2}',
        '{"count": 2, "count": "x"}',
        '{"inner": {"name": "\\ud800"}}',
        '{"inner": {"name": "\\ud83d\\ude00"}}',
        '{"inner": {"name": "\\u0000"}}',
        '{"table": {"\\udc00": 1}}',
        '{"other": "\\ud800"}',
        f'{{"other": {DEEP}}}',
        f'{{"count": {DEEP}}}',
        '{"inner":' * 100_000,
        DEEP,
        "",
        "{",
        "{} x",
        " {} ",
        "\ufeff{}",
    ],
    ids=lambda text: text[:32],
)
def test_the_same_verdict_on_hostile_text(text: str) -> None:
    assert verdict(decode, Sample, text) == verdict(naive_decode, Sample, text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le", "latin-1"])
def test_the_same_verdict_on_other_encodings(encoding: str) -> None:
    raw = '{"inner": {"name": "é"}}'.encode(encoding)
    expected = verdict(lambda raw: naive.from_json(Sample, json.loads(raw)), raw)
    assert verdict(decode, Sample, raw) == expected
    assert (expected == "refused") == (encoding == "latin-1")


def test_what_is_no_json_is_told_from_a_wrong_record() -> None:
    for text in ("", "{", b"\xff\xfe\x00", DEEP):
        with pytest.raises(ValueError, match="."):
            decode(Sample, text)
    with pytest.raises(
        ProtocolError, match="^Sample.share: expected float, got a number that is not finite$"
    ):
        decode(Sample, '{"share": 1e400}')
    with pytest.raises(ProtocolError, match="^step.inner.name: expected str, got half of a surrogate pair"):
        decode(Sample, '{"inner": {"name": "\\ud800"}}', "step")


def test_a_value_nested_beyond_all_measure_is_a_protocol_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for name in ("count", "many", "mode", "other"):
        with pytest.raises(ProtocolError, match="^Sample: nested too deeply$"):
            from_json(Sample, {name: deep})


def test_half_a_surrogate_pair_is_not_written() -> None:
    with pytest.raises(ProtocolError, match="^Inner: holds half of a surrogate pair, which is no text$"):
        encode(Inner("\ud800"))


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    ask = messages.Ask(np.int64(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cannot hold a int64"):
        encode(ask)
    heard = messages.NotNow(np.float64(0.25), "later")
    assert encode(heard) == b'{"retry_after_s":0.25,"reason":"later","elsewhere":false,"renew":false}'
    assert repr(to_json(heard)) == repr(
        {"retry_after_s": 0.25, "reason": "later", "elsewhere": False, "renew": False}
    )


def test_records_stay_plain_dataclasses() -> None:
    for kind in KINDS:
        assert dataclasses.is_dataclass(kind)
        assert kind.__mro__ == (kind, object)
