"""Strangers' text becomes one harmless line."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.words import printable, printable_lines

FORGED = "x) joined\n00:00:00  version 99: 1000 updates\x1b[8m"


def test_a_forged_line_stays_within_its_own() -> None:
    assert printable(FORGED) == r"x) joined\n00:00:00  version 99: 1000 updates\x1b[8m"


def test_what_would_turn_text_round_or_hide_is_shown() -> None:
    hidden = "a\u202eb\u2066c\u200bd\x85\u2028\ud800\x00"
    assert printable(hidden) == r"a\u202eb\u2066c\u200bd\x85\u2028\ud800\x00"


def test_ordinary_names_stay() -> None:
    for name in ("书房", "Jörg’s Küche", "👩\u200d🔬 lab", "کتاب", "a\\b"):
        assert printable(name) == name


@given(st.text(st.characters()), st.integers(1, 50))
def test_any_text_is_one_bounded_line_and_twice_is_once(text: str, most: int) -> None:
    line = printable(text, most)
    assert len(line) <= most
    assert not {unicodedata.category(c) for c in line if c != "\u200d"} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(line, most) == line


def test_a_long_text_ends_in_an_ellipsis_and_no_escape_is_cut_in_two() -> None:
    assert printable("a" * 400) == "a" * 299 + "…"
    assert printable("abc\x1b", 6) == "abc…"


def test_an_answer_keeps_its_lines_and_tabs() -> None:
    assert printable_lines("a\n\tb\x1b[2J\r") == "a\n\tb\\x1b[2J\\r"
