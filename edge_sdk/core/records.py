"""Frozen dataclasses to JSON and back, strictly: the one decoder behind every record on the wire and on disk.

msgspec does it (https://jcristharif.com/msgspec/). Unknown fields are ignored, so an older peer can read a
newer one's records; a missing field, or one of the wrong type, is an error that names it. A bool is never a
number, an int is a fine float, and NaN, infinities and halves of surrogate pairs fit no field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from edge_sdk.core.errors import ProtocolError

Record = TypeVar("Record")


def encode(record: Any, indent: int = -1) -> bytes:
    """A record as JSON in UTF-8; on lines that are indented by `indent` spaces where it is not negative.

    A float that is not finite becomes null, for JSON has no such number.

    Raises:
        ProtocolError: a text holds half of a surrogate pair.
    """
    try:
        text = _encoder.encode(record)
        return text if indent < 0 else msgspec.json.format(text, indent=indent)
    except UnicodeEncodeError as error:
        raise ProtocolError(f"{type(record).__name__}: holds {_HALF_A_PAIR}") from error


def decode(kind: type[Record], text: bytes | str, where: str = "") -> Record:
    """Decode JSON text as the dataclass `kind`, whose name or `where` begins every complaint.

    Raises:
        ValueError: not JSON.
        ProtocolError: not an object, or a field is missing or of the wrong type; names the field.
    """
    try:
        record: Record = _decoder(kind).decode(text)  # type: ignore[arg-type]  # a class can be hashed
        return record
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Read again with the tolerance of `json`, which takes UTF-16 too, for an error that names the field.
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return from_json(kind, value, where)


def to_json(record: Any) -> dict[str, Any]:
    """A record as values that JSON has (nested records become dictionaries; tuples stay)."""
    return dict(msgspec.to_builtins(record, enc_hook=_plain))


def from_json(kind: type[Record], value: Any, where: str = "") -> Record:
    """Decode what `json.loads` gave, or a table of TOML, as the dataclass `kind`.

    Raises:
        ProtocolError: as `decode` does.
    """
    label = where or kind.__name__
    try:
        return typing.cast(Record, _converted(kind, _marked(value), label))
    except RecursionError as error:
        raise ProtocolError(f"{label}: nested too deeply") from error


def _plain(value: Any) -> Any:
    """What msgspec does not know by itself: kinds of numbers (NumPy's), of texts and of mappings."""
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


_encoder = msgspec.json.Encoder(enc_hook=_plain)


@functools.cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


# --- which field, and what is wrong with it -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Misfit:
    """Stands for what Python takes from JSON and no record may hold: it fits no field."""

    what: str


_AT_THE_END = r"(?!\n)$"
_HALF_A_PAIR = "half of a surrogate pair, which is no text"
_NOT_FINITE, _NO_TEXT = _Misfit("a number that is not finite"), _Misfit(_HALF_A_PAIR)


def _marked(value: Any) -> Any:
    """The same value with every misfit marked as one."""
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOT_FINITE
    if isinstance(value, str):
        return value if _is_text(value) else _NO_TEXT
    if isinstance(value, Mapping):
        return {_shown(key): _marked(held) if _is_text(str(key)) else _NO_TEXT for key, held in value.items()}
    return list(map(_marked, value)) if isinstance(value, list | tuple) else value


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(key: Any) -> str:
    """A key as text; halves of surrogate pairs as their escapes."""
    return str(key).encode("utf-8", "backslashreplace").decode()


def _converted(hint: Any, value: Any, where: str) -> Any:
    """`value` as a `hint`; the innermost part of it that is wrong speaks for the whole."""
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        for at, inner, part in parts(hint, value):
            _converted(inner, part, where + at)
        raise ProtocolError(where + _complaint(hint, value, error)) from error


def needed(hint: Any) -> Any:
    """X of `X | None`, and of X with a range."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return needed(next(argument for argument in typing.get_args(hint) if argument is not type(None)))
    return needed(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else hint


def range_of(hint: Any) -> msgspec.Meta | None:
    """The range of what should be a `hint`, if it has one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return range_of(next(argument for argument in typing.get_args(hint) if argument is not type(None)))
    if typing.get_origin(hint) is typing.Annotated:
        return next((meta for meta in typing.get_args(hint)[1:] if isinstance(meta, msgspec.Meta)), None)
    return None


def in_words(meta: msgspec.Meta) -> str:
    """What a value must be to lie in a range."""
    if meta.pattern is not None:
        return f"be text of the form {meta.pattern.replace(_AT_THE_END, '$')}"
    if meta.max_length is not None:
        return f"have at most {meta.max_length} items or characters"
    if meta.gt is not None:
        return f"be above {meta.gt}" + (f" and at most {_number(meta.le)}" if meta.le is not None else "")
    return f"be {meta.ge} to {_number(meta.le)}" if meta.le is not None else f"be {meta.ge} or more"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def parts(hint: Any, value: Any) -> list[tuple[str, Any, Any]]:
    """Place, type and value of each part of what should be a `hint`: of a field `.name`, of an item `[i]`.

    Nothing where the whole is of the wrong kind or length.
    """
    hint = needed(hint)
    arguments = typing.get_args(hint)
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        names = [field.name for field in dataclasses.fields(hint) if field.name in value]
        return [(f".{name}", hints[name], value[name]) for name in names]
    if isinstance(value, dict) and typing.get_origin(hint) is dict:
        keys = [(f" key {_short(key)}", arguments[0], key) for key in value]
        return [*keys, *((f".{_short(key, str)}", arguments[1], held) for key, held in value.items())]
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return [(f"[{i}]", *pair) for i, pair in enumerate(zip(inner, value, strict=True))]
    return []


def _complaint(hint: Any, value: Any, error: msgspec.ValidationError) -> str:
    """What is wrong with a value all of whose parts are right."""
    meta, hint = range_of(hint), needed(hint)
    if meta is not None and _is_a(hint, value):
        return f": must {in_words(meta)}, got {_got(value)}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        missing = [field.name for field in dataclasses.fields(hint) if _lacks(value, field)]
        return f".{missing[0]} is missing" if missing else f": {error}"
    if origin is typing.Literal and not isinstance(value, _Misfit):
        return f": {reprlib.repr(value)} is not one of {', '.join(map(repr, arguments))}"
    if origin is tuple and isinstance(value, list):
        return f": expected {len(arguments)} items, got {len(value)}"
    names = {dict: "an object", tuple: "an array", typing.Literal: "text"}
    name = "an object" if dataclasses.is_dataclass(hint) else names.get(origin) or hint.__name__
    got = value.what if isinstance(value, _Misfit) else "null" if value is None else type(value).__name__
    return f": expected {name}, got {got}"


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value is of the right kind, whatever its range."""
    kind = typing.get_origin(hint) or hint
    kinds = {float: (int, float), tuple: (list, tuple)}.get(kind, (kind,))
    return isinstance(value, kinds) and not isinstance(value, bool)


def _got(value: Any) -> str:
    """A value that is out of range, never at length."""
    if isinstance(value, dict | list | tuple):
        return str(len(value))
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return _short(value)


def _short(value: Any, show: Callable[[Any], str] = repr) -> str:
    """The beginning of a value."""
    text = show(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lacks(value: dict[str, Any], field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.name not in value and field.default is missing and field.default_factory is missing
