"""Records to JSON and back; the messages of the wire; what the decoder refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core import messages
from edge_sdk.core.errors import BaseMismatch, ProtocolError
from edge_sdk.core.records import decode, from_json, range_of, to_json
from tests.edge_sdk.core import strategies

RECORDS = [
    kind
    for kind in vars(messages).values()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__module__ == messages.__name__
]

# Finite floats: the only ones that JSON has. Federation refuses any protocol but its own.
st.register_type_strategy(float, strategies.finite)
for kind in RECORDS:
    own = {"protocol": messages.PROTOCOL_VERSION} if kind is messages.Federation else {}
    st.register_type_strategy(kind, strategies.record(kind, **own))


def test_all_records_are_tested() -> None:
    assert {kind.__name__ for kind in RECORDS} >= {"Federation", "Assignment", "Update", "Status", "NotNow"}


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_round_trip(kind: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(kind))
    text = json.dumps(to_json(record), allow_nan=False)
    assert from_json(kind, json.loads(text)) == record


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_unknown_fields_are_ignored(kind: type[Any], data: st.DataObject) -> None:
    record = data.draw(st.from_type(kind))
    assert from_json(kind, to_json(record) | {"of_a_later_version": [1, {"x": None}]}) == record


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_missing_field_is_named_or_has_its_default(kind: type[Any], data: st.DataObject) -> None:
    value = to_json(data.draw(st.from_type(kind)))
    field = data.draw(st.sampled_from(dataclasses.fields(kind)))
    del value[field.name]
    if field.default is not dataclasses.MISSING:
        assert getattr(from_json(kind, value), field.name) == field.default
    elif field.default_factory is not dataclasses.MISSING:
        assert getattr(from_json(kind, value), field.name) == field.default_factory()
    else:
        with pytest.raises(ProtocolError, match=rf"^{kind.__name__}\.{field.name} is missing$"):
            from_json(kind, value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_any_json_in_any_field_decodes_or_is_a_protocol_error(kind: type[Any], data: st.DataObject) -> None:
    value = to_json(data.draw(st.from_type(kind)))
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(kind)]))
    value[name] = data.draw(json_values)
    try:
        record = from_json(kind, value)
    except ProtocolError as error:
        assert name in str(error)
    else:
        assert from_json(kind, to_json(record)) == record


@given(json_values)
def test_any_json_as_a_record(value: Any) -> None:
    try:
        from_json(messages.Federation, value)
    except ProtocolError as error:
        assert str(error).startswith("Federation")


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str


@dataclasses.dataclass(frozen=True)
class Sample:
    count: int = 0
    share: float = 0.0
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    maybe: int | None = None
    inner: Inner | None = None
    pair: tuple[int, str] = (0, "")
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", True, "Sample.count: expected int, got bool"),
        ("count", 1.0, "Sample.count: expected int, got float"),
        ("count", "1", "Sample.count: expected int, got str"),
        ("count", None, "Sample.count: expected int, got null"),
        ("share", True, "Sample.share: expected float, got bool"),
        ("share", math.nan, "Sample.share: expected float, got a number that is not finite"),
        ("share", math.inf, "Sample.share: expected float, got a number that is not finite"),
        ("share", 10**400, "Sample.share: expected float, got int"),
        ("flag", 1, "Sample.flag: expected bool, got int"),
        ("mode", "c", "Sample.mode: 'c' is not one of 'a', 'b'"),
        ("mode", ["a"], "Sample.mode: ['a'] is not one of 'a', 'b'"),
        ("maybe", "x", "Sample.maybe: expected int, got str"),
        ("inner", [], "Sample.inner: expected an object, got list"),
        ("inner", {}, "Sample.inner.name is missing"),
        ("pair", [1], "Sample.pair: expected 2 items, got 1"),
        ("pair", [1, 2], "Sample.pair[1]: expected str, got int"),
        ("pair", "ab", "Sample.pair: expected an array, got str"),
        ("many", [{"name": "x"}, {"name": 5}], "Sample.many[1].name: expected str, got int"),
        ("many", {}, "Sample.many: expected an array, got dict"),
        ("table", [], "Sample.table: expected an object, got list"),
        ("table", {"x": "y"}, "Sample.table.x: expected float, got str"),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        from_json(Sample, {field: value})
    assert str(caught.value) == message


def test_what_fits() -> None:
    value = {"share": 2, "maybe": 3, "inner": {"name": "n"}, "pair": [1, "x"], "table": {"k": 1}}
    record = from_json(Sample, value)
    assert record == Sample(share=2.0, maybe=3, inner=Inner("n"), pair=(1, "x"), table={"k": 1.0})
    assert type(record.share) is float
    assert from_json(Sample, {"maybe": None}).maybe is None


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_what_is_no_object(value: Any) -> None:
    with pytest.raises(ProtocolError, match="^Sample: expected an object"):
        from_json(Sample, value)


def test_another_protocol_is_refused_by_number() -> None:
    value = to_json(
        messages.Federation("f", messages.Base("m", "f" * 64, {}), "carry", (4,), 8, 1.0, "balanced")
    )
    with pytest.raises(ProtocolError, match="speaks protocol 2, this device 1"):
        from_json(messages.Federation, value | {"protocol": 2})


def test_another_base_is_refused_by_fingerprint() -> None:
    base = messages.Base("tiny", "a" * 64, {})
    base.require("a" * 64)
    with pytest.raises(BaseMismatch, match="fingerprint b{12}, the federation trains tiny with a{12};"):
        base.require("b" * 64)


UPDATE = {"digest": "ab" * 32, "size_bytes": 1, "rank": 4, "examples": 1, "steps": 1}
UPDATE |= {"loss_before": 1.0, "loss_after": 1.0, "train_s": 1.0}
WORK = {"id": "a", "version": 1, "rank": 4, "carry_rank": 0, "steps": 1, "seed": 1, "expires_in_s": 1.0}


@pytest.mark.parametrize(
    ("kind", "good", "field", "value", "message"),
    [
        (messages.Update, UPDATE, "steps", 10**400, "must be 0 to 2147483647, got a number of 401 digits"),
        (messages.Update, UPDATE, "size_bytes", -5, "must be 0 to 1125899906842624, got -5"),
        (messages.Update, UPDATE, "train_s", -0.5, "must be 0 to 1000000000, got -0.5"),
        (messages.Update, UPDATE, "digest", "AB" * 32, "must be text of the form ^[0-9a-f]{64}$, got"),
        (
            messages.Assignment,
            WORK,
            "id",
            "a\n",
            "must be text of the form ^[A-Za-z0-9_-]{1,64}$, got 'a\\n'",
        ),
        (messages.Assignment, WORK, "id", "../" * 999, "^[A-Za-z0-9_-]{1,64}$, got '../../"),
        (messages.Assignment, WORK, "start", "/", "must be text of the form ^([0-9a-f]{16})?$, got '/'"),
        (messages.Assignment, WORK, "seed", -1, "got -1"),
        (messages.Training, {}, "steps", 0, "must be 1 to 2147483647, got 0"),
        (messages.Training, {}, "learning_rate", 0.0, "must be above 0 and at most 1000000, got 0.0"),
        (messages.NotNow, {"retry_after_s": 1, "reason": ""}, "retry_after_s", -1, "got -1"),
        (messages.NotNow, {"retry_after_s": 1, "reason": ""}, "reason", "x" * 99999, "at most 65536"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_short_line(
    kind: type[Any], good: dict[str, Any], field: str, value: Any, message: str
) -> None:
    from_json(kind, good)
    for read, spoilt in ((from_json, good | {field: value}), (decode, json.dumps(good | {field: value}))):
        with pytest.raises(ProtocolError) as caught:
            read(kind, spoilt)  # type: ignore[operator]
        said = str(caught.value)
        assert said.startswith(f"{kind.__name__}.{field}: ")
        assert message in said
        assert len(said) < 200
        assert said.isprintable()


def test_every_number_and_name_of_the_wire_has_a_range() -> None:
    def bare(hint: Any) -> list[Any]:
        if range_of(hint) is not None and typing.get_origin(hint) is typing.Annotated:
            inner = typing.get_args(typing.get_args(hint)[0])
        elif hint in (int, float, str):
            return [hint]
        elif typing.get_origin(hint) is typing.Literal:
            return []
        else:
            inner = typing.get_args(hint)
        return [found for argument in inner for found in bare(argument)]

    for kind in RECORDS:
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            assert not bare(hint), f"{kind.__name__}.{name}"
