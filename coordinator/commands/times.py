"""Durations in words, for a table."""

from __future__ import annotations

_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def within(seconds: float) -> str:
    """About how long: `3 d`, `12 min`."""
    for unit_s, name in _UNITS:
        if seconds >= 2 * unit_s or unit_s == 1.0:
            return f"{max(0, round(seconds / unit_s))} {name}"
    raise AssertionError("the last unit is a second")


def ago(seconds: float) -> str:
    """About how long ago."""
    return f"{within(seconds)} ago"
