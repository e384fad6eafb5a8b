"""The decoder that msgspec replaced, written by hand: what `edge_sdk.core.records` must agree with.

Tests compare verdicts and values of the two, and the benchmark their speed. It is what it was but for
three points: integers count as floats up to the largest float, halves of surrogate pairs are no keys, and
fields have ranges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edge_sdk.core.errors import ProtocolError

Record = TypeVar("Record")


def to_json(record: Any) -> dict[str, Any]:
    """A record as JSON values (nested records become objects, tuples arrays)."""
    kind: Any = type(record)
    return {name: _plain(getattr(record, name)) for name, _, _ in _fields_of(kind)}


def _plain(value: Any) -> Any:
    """JSON values as they are, and what holds records rebuilt."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    return to_json(value)


def from_json(kind: type[Record], value: Any, where: str = "") -> Record:
    """Decode `value` as the dataclass `kind`.

    Raises:
        ProtocolError: `value` is not an object, or a field is missing or of the wrong type; names the field.
    """
    label = where or kind.__name__
    if not isinstance(value, Mapping):
        raise ProtocolError(f"{label}: expected an object, got {_kind_of(value)}")
    arguments = {}
    for name, hint, required in _fields_of(kind):  # type: ignore[arg-type]  # a class can be hashed
        if name in value:
            arguments[name] = _decode(hint, value[name], f"{label}.{name}")
        elif required:
            raise ProtocolError(f"{label}.{name} is missing")
    return kind(**arguments)


@functools.cache
def _fields_of(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether there is no default, of each field. Resolving hints takes a while."""
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return tuple(
        (field.name, hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    )


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and build it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _within(arguments[1], _decode(arguments[0], value, where), where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = next(a for a in arguments if a is not type(None))
        return _decode(inner, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ProtocolError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ProtocolError(f"{where}: expected an object, got {_kind_of(value)}")
        for key in value:
            _decode(arguments[0], str(key), where)
        return {str(k): _decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    return _decode_scalar(hint, value, where)


def _within(meta: Any, value: Any, where: str) -> Any:
    """Refuse a value outside a range."""
    wrong = (
        (meta.ge is not None and value < meta.ge)
        or (meta.gt is not None and value <= meta.gt)
        or (meta.le is not None and value > meta.le)
        or (meta.max_length is not None and len(value) > meta.max_length)
        or (meta.pattern is not None and not re.search(meta.pattern, value))
    )
    if wrong:
        raise ProtocolError(f"{where}: out of range")
    return value


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Decode `tuple[X, ...]` or a tuple of fixed length."""
    if not isinstance(value, list | tuple):
        raise ProtocolError(f"{where}: expected an array, got {_kind_of(value)}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ProtocolError(f"{where}: expected {len(arguments)} items, got {len(value)}")
    pairs = zip(arguments, value, strict=True)
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    """Decode str, bool, int or a finite float; an int is a fine float, a bool is never a number.

    JSON can spell half of a surrogate pair, which is no text that could be stored or sent.
    """
    if hint is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ProtocolError(f"{where}: expected {hint.__name__}, got {_kind_of(value)}")
    if hint is str and any("\ud800" <= character <= "\udfff" for character in value):
        raise ProtocolError(f"{where}: holds half of a surrogate pair, which is no text")
    return value


def _kind_of(value: Any) -> str:
    """A short name for a JSON value in a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    return "null" if value is None else type(value).__name__
