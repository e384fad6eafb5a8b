"""The log that a stopped measurement goes on from: what it takes up, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.common import command
from benchmarks.common.results import Results, opened
from edge_sdk.core.errors import InputError

CASE = {"mix": "all 2", "seed": 0}
OTHER = {"mix": "all 2", "seed": 1}


def never() -> None:
    raise AssertionError("known already")


def kept(path: Path, steps: int = 10, benchmark: str = "rules") -> Results:
    return Results(path, benchmark, {"steps": steps, "ranks": (2, 4)})


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "log.jsonl"
    assert kept(path).get(CASE, lambda: 1.5) == 1.5
    again = kept(path)
    assert again.get(dict(reversed(CASE.items())), never) == 1.5
    assert again.find(OTHER) is None
    assert again.get(OTHER, lambda: math.inf) == math.inf
    assert kept(path).get(OTHER, never) == math.inf
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_the_first_line_says_what_was_measured_where(tmp_path: Path) -> None:
    kept(tmp_path / "log").get(CASE, lambda: 1)
    head = json.loads((tmp_path / "log").read_text(encoding="utf-8").splitlines()[0])
    settings = {"steps": 10, "ranks": [2, 4]}
    assert head == {"benchmark": "rules", "settings": settings, "machine": command.machine()}


def test_a_result_is_the_same_now_and_from_the_log(tmp_path: Path) -> None:
    now = kept(tmp_path / "log").get(CASE, lambda: {"marks": (1, 2), "losses": {4: 0.5}})
    assert now == {"marks": [1, 2], "losses": {"4": 0.5}} == kept(tmp_path / "log").get(CASE, never)


def test_without_a_file_results_are_kept_all_the_same() -> None:
    results = Results(None, "rules", {})
    assert results.get(CASE, lambda: 1) == results.get(CASE, never) == 1


def test_a_last_line_that_was_torn_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    kept(path).get(CASE, lambda: 1)
    whole = path.read_bytes()
    kept(path).get(OTHER, lambda: 2)
    for size in range(len(whole), path.stat().st_size):
        torn = tmp_path / "torn"
        torn.write_bytes(path.read_bytes()[:size])
        assert kept(torn).find(OTHER) is None
        assert kept(torn).get(OTHER, lambda: 3) == 3
        assert kept(torn).get(CASE, never) == 1
        assert kept(torn).get(OTHER, never) == 3


def test_a_log_whose_first_line_was_torn_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"benchmark": "ru', encoding="utf-8")
    kept(tmp_path / "log").get(CASE, lambda: 1)
    assert kept(tmp_path / "log").get(CASE, never) == 1


def test_a_damaged_log_is_named_with_its_line(tmp_path: Path) -> None:
    kept(tmp_path / "log").get(CASE, lambda: 1)
    whole = (tmp_path / "log").read_text(encoding="utf-8")
    (tmp_path / "log").write_text(whole + '{"mix": "al\n', encoding="utf-8")
    with pytest.raises(InputError, match="log:3: not JSON"):
        kept(tmp_path / "log")
    (tmp_path / "log").write_text(whole + '{"mix": "all 2"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="log:3: not a case with its result"):
        kept(tmp_path / "log")


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    kept(tmp_path / "log").get(CASE, lambda: 1)
    with pytest.raises(InputError, match=r'settings \{"steps": 10, .* not \{"steps": 20'):
        kept(tmp_path / "log", steps=20)
    with pytest.raises(InputError, match='benchmark "rules", not "privacy"'):
        kept(tmp_path / "log", benchmark="privacy")


def test_a_command_ends_where_its_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        opened(command.parser("rules", "docs"), tmp_path / "log", "rules", {})
    assert ended.value.code == 2
    assert "log:1: not a case" in capsys.readouterr().err
