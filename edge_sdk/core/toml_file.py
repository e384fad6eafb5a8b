"""Files that people write in TOML, read as frozen dataclasses: one error a line, naming file, table and key.

A misspelt key must not be ignored in silence, so an unknown one is refused, with the nearest known one.
Tables are nested dataclasses, arrays of tables tuples of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from edge_sdk.core.errors import InputError, ProtocolError
from edge_sdk.core.records import from_json, needed, parts

Record = TypeVar("Record")


def load(kind: type[Record], path: Path) -> Record:
    """The file at `path` as a `kind`.

    Raises:
        InputError: as `parse`; or there is no such file, or it is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start} is wrong") from error
    return parse(kind, text, str(path))


def parse(kind: type[Record], text: str, source: str) -> Record:
    """TOML text as a `kind`; `source` names the file in messages. A byte order mark does no harm.

    Raises:
        InputError: not TOML, an unknown or missing key, or a value that cannot be.
    """
    try:
        values = tomllib.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a TOML file: {_with_line(error, text)}") from error
    _refuse_unknown(kind, values, "", source)
    try:
        return from_json(kind, values, "key")
    except ProtocolError as error:
        said = str(error).replace("key.", "key ", 1).replace(": expected an object", ": expected a table", 1)
        raise InputError(f"{source}: {said}") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _with_line(error: Exception, text: str) -> str:
    """What tomllib says, which gives a line for all but the end."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).replace("at end of document", f"at the end, line {len(text.splitlines()) or 1}")


def _refuse_unknown(hint: Any, value: Any, place: str, source: str) -> None:
    """Look for keys that no field has, in this table and in those inside it."""
    kind, prefix = needed(hint), f"{place}." if place else ""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                keys = ", ".join(prefix + name for name in known)
                near = difflib.get_close_matches(key, known, n=1)
                meant = f"; did you mean {prefix + near[0]!r}?" if near else ""
                raise InputError(f"{source}: unknown key {prefix + key!r}; the keys are {keys}{meant}")
    for at, inner, part in parts(kind, value):
        _refuse_unknown(inner, part, (place + at).removeprefix("."), source)
