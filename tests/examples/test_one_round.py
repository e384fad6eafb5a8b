"""The page that a newcomer reads first: it runs either way, and says what can be computed by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "examples" / "one_round.py"

# Rank -> weight, and what it hands in the first time.
WEIGHTS = {1: Fraction(1, 4), 2: Fraction(1, 4), 4: Fraction(1, 2)}
FIRST = {1: [8], 2: [8, 4], 4: [8, 6, 4, 2]}


def average(states: dict[int, list[int]]) -> list[Fraction]:
    """Place by place, whoever has none counts as 0."""
    return [
        sum(
            (WEIGHTS[rank] * state[place] for rank, state in states.items() if place < len(state)),
            Fraction(0),
        )
        for place in range(4)
    ]


@pytest.mark.parametrize("way", [["-m", "examples.one_round"], [str(PAGE)]], ids=["module", "file"])
def test_the_printed_numbers_are_those_of_the_hand(way: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *way],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.findall(r"[\d.]+", line) for line in done.stdout.splitlines()]
    states = FIRST
    for version in (1, 2):
        (head, *devices), lines = lines[:4], lines[4:]
        summed = average(states)
        kept, lost = summed[:3], summed[3]
        share = lost**2 / sum(s**2 for s in summed)
        assert head == [str(version), *map(str, kept), f"{float(share):.2%}".rstrip("%")]
        assert [found[0] for found in devices] == ["1", "2", "4"]
        for found in devices:
            rank = int(found[0])
            assert found[1:] == [str(s) for s in [*kept, 0][:rank]]
        states = {rank: [2 * int(s) for s in [*kept, 0][:rank]] for rank in WEIGHTS}
    assert lines == []


def test_the_page_is_one_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert not re.search(r"import (torch|httpx|aiohttp)", text)
    for said in ("8/4 + 8/4 + 8/2 = 8", "8/4 + 8/2 = 6"):
        assert said in text
        left, right = said.split(" = ")
        assert sum(map(Fraction, left.split(" + "))) == int(right)
