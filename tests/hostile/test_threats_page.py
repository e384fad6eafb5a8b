"""docs/THREATS.md and the tests agree: what is named exists, and every hostile test is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "THREATS.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([A-Z]\d+) \|(.*)\|$", re.MULTILINE)
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
NOT_DEFENDED = re.compile(r"not defended, because .{20,}")
ROWS = {number: [cell.strip() for cell in cells.split(" | ")] for number, cells in ROW.findall(PAGE)}
OF_THE_PAGE = Path(__file__).name


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}


def test_numbers_are_unique_and_every_row_is_whole() -> None:
    assert len(ROW.findall(PAGE)) == len(ROWS) > 20
    assert [number for number, cells in ROWS.items() if len(cells) != 4 or not all(cells)] == []


def test_a_row_names_a_test_that_exists_or_says_why_not() -> None:
    for number, (*_, proof) in ROWS.items():
        named = TEST.findall(proof)
        assert named or NOT_DEFENDED.search(proof), number
        for file, test in named:
            assert test in functions_of(ROOT / file), (number, file, test)


def test_every_hostile_test_is_a_row() -> None:
    named = set(TEST.findall(PAGE))
    for path in (ROOT / "tests" / "hostile").glob("test_*.py"):
        if path.name != OF_THE_PAGE:
            file = path.relative_to(ROOT).as_posix()
            assert {(file, test) for test in functions_of(path)} <= named
