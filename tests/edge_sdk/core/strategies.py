"""Hypothesis strategies for records, with the ranges that their fields have."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgspec
from hypothesis import strategies as st

from edge_sdk.core.records import range_of

finite = st.floats(allow_nan=False, allow_infinity=False)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if (meta := range_of(hint)) is not None and origin is typing.Annotated:
        return _within(arguments[0], meta)
    if dataclasses.is_dataclass(hint):
        return st.from_type(typing.cast(Any, hint))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(values, arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if origin is not None and type(None) in arguments:
        return st.none() | st.one_of(*(values(one) for one in arguments if one is not type(None)))
    return finite if hint is float else st.from_type(hint)


def _within(kind: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    if meta.pattern is not None:
        return st.from_regex(meta.pattern).filter(lambda text: len(text.encode()) == len(text))
    if kind is int:
        return st.integers(meta.ge, meta.le)  # type: ignore[arg-type]  # of an int they are ints
    if kind is float:
        least = meta.ge if meta.gt is None else meta.gt
        return st.floats(
            least, meta.le, exclude_min=meta.gt is not None, allow_nan=False, allow_infinity=False
        )
    return st.text(max_size=20) if kind is str else values(kind)


def record(kind: type[Any], **fixed: Any) -> st.SearchStrategy[Any]:
    """Records of a kind, some of whose fields are given."""
    hints = typing.get_type_hints(kind, include_extras=True)
    drawn = {field.name: values(hints[field.name]) for field in dataclasses.fields(kind)}
    return st.builds(kind, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})
