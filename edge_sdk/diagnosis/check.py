"""One line of a diagnosis: what was looked at, how it is, what was found, and what mends it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from edge_sdk.core.words import printable
from edge_sdk.system.terminal import MOST

State = Literal["fine", "warning", "not fine"]

COLOURS = {"fine": "32", "warning": "33", "not fine": "1;31"}  # ANSI: green, yellow, bold red
STATE_WIDTH, SUBJECT_WIDTH = 10, 13


@dataclass(frozen=True)
class Check:
    """The outcome of one check. `mend` is a command or an action, and empty where all is fine."""

    subject: str
    state: State
    found: str
    mend: str = ""


def fine(subject: str, found: str) -> Check:
    """Nothing to do."""
    return Check(subject, "fine", found)


def warning(subject: str, found: str, mend: str) -> Check:
    """Taking part works, but less well than it could."""
    return Check(subject, "warning", found, mend)


def not_fine(subject: str, found: str, mend: str) -> Check:
    """Taking part will fail."""
    return Check(subject, "not fine", found, mend)


def rendered(check: Check, width: int | None = None, colour: bool = False) -> str:
    """A check for people: one line, and one with what mends it; folded to `width` columns if given."""
    indent = " " * (STATE_WIDTH + SUBJECT_WIDTH)
    lines = _folded(printable(check.found, MOST), indent, width)
    if check.mend:
        lines += _folded(printable(f"→ {check.mend}", MOST), indent, width)
    head = painted(check.state) if colour else f"{check.state:<{STATE_WIDTH}}"
    lines[0] = f"{head}{check.subject:<{SUBJECT_WIDTH}}{lines[0].lstrip()}"
    return "\n".join(lines)


def painted(state: State) -> str:
    """A state in its colour."""
    return f"\x1b[{COLOURS[state]}m{state:<{STATE_WIDTH}}\x1b[0m"


def _folded(text: str, indent: str, width: int | None) -> list[str]:
    """`text` below `indent`; words longer than a line, as paths are, stay whole."""
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        max(width, len(indent) + 20),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
