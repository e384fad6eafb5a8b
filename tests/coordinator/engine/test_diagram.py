"""The page about the engine says what the engine does."""

from __future__ import annotations

import re
from pathlib import Path

from coordinator.engine import diagram
from coordinator.engine.transitions import VERSION, WORK

PAGE = Path(__file__).parents[3] / "docs" / "ENGINE.md"


def test_the_page_is_drawn_from_the_tables() -> None:
    said = "run `python -m coordinator.engine.diagram > docs/ENGINE.md`"
    assert PAGE.read_text(encoding="utf-8") == diagram.page(), said


def test_the_diagram_has_an_arrow_for_each_change_of_phase_and_no_other() -> None:
    text = diagram.diagram(WORK, "idle")
    arrows = set(re.findall(r"^    (\w+) --> (\w+) :", text, re.MULTILINE))
    rows = [row for one in WORK for row in one.rows]
    assert arrows == {(p, row.to) for row in rows for p in row.phases if row.to and row.to != p}
    assert ("idle", "training") in arrows
    assert ("idle", "late") not in arrows


def test_a_label_ends_no_line_early() -> None:
    """A semicolon would: Mermaid takes it for the end of a statement."""
    for rows, first in ((WORK, "idle"), (VERSION, "collecting")):
        assert ";" not in diagram.diagram(rows, first)  # type: ignore[type-var]


def test_every_row_is_in_the_table() -> None:
    head = 2
    assert len(diagram.table(WORK)) == sum(len(one.rows) for one in WORK) + head
    assert len(diagram.table(VERSION)) == sum(len(one.rows) for one in VERSION) + head
    assert "| asked | idle, late | otherwise | grant a lease | training |" in diagram.table(WORK)
