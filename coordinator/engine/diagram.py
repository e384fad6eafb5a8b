"""docs/ENGINE.md, drawn from the tables of transitions: `python -m coordinator.engine.diagram` prints it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from coordinator.engine.transitions import VERSION, WORK, AnyRow, OnEvent, Pass, Phase

_HEAD = """\
# The engine

Drawn from the tables in `coordinator/engine/transitions.py` by `python -m coordinator.engine.diagram`; a test
compares. In a phase the first row for an event whose condition holds is taken. What the words mean is in
[DESIGN.md](DESIGN.md).
"""
_WORK = """
## The work of one device

`idle`: without work. `training`: it holds a lease, and a slot. `late`: the lease has expired and the slot is
free; the work goes on, and its update still counts. The diagram has the rows that lead to another phase.
"""
_VERSION = """
## A version in the making

`collecting`: waiting for updates. `merging`: one merge at a time. `resting`: a merge failed for the host's
own reasons, a full disk say. After `merged`, what came in meanwhile is looked at as at a tick.
"""


def page() -> str:
    """The whole page, in Markdown with Mermaid diagrams."""
    return "\n".join(
        [
            _HEAD,
            *(_WORK, diagram(WORK, "idle"), "", *table(WORK)),
            *(_VERSION, diagram(VERSION, "collecting"), "", *table(VERSION), ""),
        ]
    )


def diagram(events: Sequence[OnEvent[Phase]], first: Phase) -> str:
    """A Mermaid state diagram of the rows that change the phase; rows between two phases share an arrow."""
    arrows: dict[tuple[str, str], dict[str, list[str]]] = {}  # from, to: what is done -> at which events
    for event, row in rows_of(events):
        for phase in row.phases:
            if row.to is not None and row.to != phase:
                done = _label(row.do).replace(";", ",")  # to Mermaid a semicolon is the end of a line
                arrows.setdefault((phase, row.to), {}).setdefault(done, []).append(event)
    lines: list[str] = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first}"]
    for (begin, end), things in arrows.items():
        said = (f"{', '.join(dict.fromkeys(kinds))} / {done}" for done, kinds in things.items())
        lines.append(f"    {begin} --> {end} : {'<br/>'.join(said)}")
    return "\n".join([*lines, "```"])


def table(events: Sequence[OnEvent[Phase]]) -> list[str]:
    """Every row, as a Markdown table."""
    lines = ["| event | in | if | then | and is |", "|---|---|---|---|---|"]
    for event, row in rows_of(events):
        condition = _label(row.when) if row.when else "otherwise"
        to = row.to or "as before"
        again = ", and sees the event again" if isinstance(row, Pass) else ""
        lines.append(f"| {event} | {', '.join(row.phases)} | {condition} | {_label(row.do)} | {to}{again} |")
    return lines


def rows_of(events: Sequence[OnEvent[Phase]]) -> Iterator[tuple[str, AnyRow[Phase]]]:
    """Each row beside its event in words: `BytesArrived` -> bytes arrived."""
    for one in events:
        name = one.event.__name__
        words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
        yield from ((words, row) for row in one.rows)


def _label(function: Callable[..., Any]) -> str:
    """The docstring as a phrase within a sentence."""
    said = (inspect.getdoc(function) or function.__name__).removesuffix(".")
    return said[0].lower() + said[1:].replace("\n", " ")


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
