"""The example of a rule of one's own prints what its comment works out."""

from __future__ import annotations

import pytest

from examples import own_rule


def test_two_changes_are_brought_to_one_length(capsys: pytest.CaptureFixture[str]) -> None:
    own_rule.main()
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said == [["Carry", "0.50", "5.00"], ["EvenHanded", "2.75", "2.75"]]
