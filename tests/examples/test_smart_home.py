"""The smart-home generator: who knows what, and that nothing of the test is ever trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.errors import InputError
from examples import smart_home
from examples.smart_home import INTENTS, SLOTS, TEMPLATES, households, is_test, main


def test_there_are_twelve_intents_of_six_to_ten_phrasings() -> None:
    assert len(INTENTS) >= 12
    for slots, phrasings in TEMPLATES.values():
        assert 6 <= len(set(phrasings)) <= 10
        for phrasing in phrasings:
            assert all(f"{{{slot}}}" in phrasing for slot in slots)


@given(st.integers(4, 40), st.integers(0, 10_000))
def test_each_intent_is_known_to_two_and_to_no_more_than_half(count: int, seed: int) -> None:
    homes = households(count, seed, train_per_intent=1, test_per_intent=1)
    known = {intent: sum(intent in home.intents for home in homes) for intent in INTENTS}
    assert all(3 <= len(set(home.intents)) == len(home.intents) <= 4 for home in homes)
    assert all(uses == 0 or 2 <= uses <= count / 2 for uses in known.values())
    if count >= 6:
        assert all(known.values())


def test_no_test_command_is_in_anybodys_training_data() -> None:
    homes = [home for seed in range(5) for home in households(8, seed, 60, 10)]
    trained = {record["prompt"] for home in homes for record in home.train}
    tested = {record["prompt"] for home in homes for record in home.test}
    tested |= {record["prompt"] for record in smart_home.test_set(INTENTS, 40, 0)}
    assert not trained & tested
    assert not any(map(is_test, trained))
    assert all(map(is_test, tested))


def test_a_command_has_one_meaning_and_its_values_stand_in_it() -> None:
    meanings: dict[str, str] = {}
    for intent in INTENTS:
        for record in smart_home.test_set((intent,), 40, 3):
            assert meanings.setdefault(record["prompt"], record["completion"]) == record["completion"]
            values = json.loads(record["completion"])
            assert values.pop("intent") == intent
            assert all(str(value) in record["prompt"] for value in values.values())
            assert len(record["prompt"].split()) <= 14
            assert len(record["completion"]) <= 80


def test_household_data_is_of_its_own_intents_and_the_same_for_a_seed() -> None:
    first, again, other = households(6, 0), households(6, 0), households(6, 1)
    assert first == again != other
    for home in first:
        for records, per_intent in ((home.train, 60), (home.test, 10)):
            intents = [json.loads(record["completion"])["intent"] for record in records]
            assert {intent: intents.count(intent) for intent in home.intents} == dict.fromkeys(
                home.intents, per_intent
            )
            assert len({record["prompt"] for record in records}) == len(records)
    assert {slot for slots, _ in TEMPLATES.values() for slot in slots} == set(SLOTS)


def test_the_command_line_writes_a_file_for_each_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--households", "4", "--train", "3", "--test", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert len(list(tmp_path.iterdir())) == 8
    home = households(4, 0, 3, 2)[0]
    lines = (tmp_path / f"{home.name}.train.jsonl").read_text().splitlines()
    assert tuple(map(json.loads, lines)) == home.train


def test_impossible_wishes_are_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--households", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: 3 households are too few")
    with pytest.raises(InputError, match="not 5000 different commands for vacuum_start"):
        smart_home.test_set(("vacuum_start",), 5000, 0)
