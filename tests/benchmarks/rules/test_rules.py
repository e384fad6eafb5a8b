"""The comparison of the rules: the order on a known target, who trains what, paired differences, the log."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import clients as rules_clients
from benchmarks.common.clients import Clients, SmartHome, Task
from benchmarks.common.results import Results
from benchmarks.rules import __main__ as rules
from benchmarks.rules import grid as rules_grid
from benchmarks.rules import toy as rules_toy
from benchmarks.rules import training as rules_training
from benchmarks.rules.grid import MIXES, Case, dealt
from benchmarks.rules.report import (
    BASELINE,
    Pairing,
    difference,
    differences_table,
    loss,
    pairings,
    toy_table,
)
from benchmarks.rules.training import BUFFER_SIZE, Way, turns
from examples import smart_home
from examples.instruction_clients import Client

VERSIONS = 30  # of the synthetic target; the benchmark takes 120
UNEQUAL = ("heavy-tail-light", "uniform", "all 2")


@functools.cache
def error(way: str, mix: str, mode: str = "buffered") -> float:
    return rules_toy.error(way, mix, mode, 0, VERSIONS)


@pytest.mark.parametrize("mode", list(rules_toy.MOST_STALE))
@pytest.mark.parametrize("mix", UNEQUAL)
def test_what_devices_changed_beats_the_published_average_where_devices_are_small(
    mix: str, mode: str
) -> None:
    published, innovation = error("flexlora", mix, mode), error("innovation", mix, mode)
    assert innovation < 0.98 * published
    assert error("carry", mix, mode) < 0.8 * innovation


def test_rank_2_devices_that_carry_learn_as_well_as_rank_16_devices_do() -> None:
    assert error("carry", "all 2") < 1.2 * error("flexlora", "all 16")
    assert error("flexlora", "all 2") > 4 * error("flexlora", "all 16")


def test_averaging_factors_is_for_one_rank_alone() -> None:
    assert rules_toy.applies("fedit", "all 2")
    assert not rules_toy.applies("fedit", "uniform")
    assert rules_toy.applies("hetlora", "uniform")


def test_every_device_takes_part_once_before_any_does_twice() -> None:
    devices = 10  # no multiple of the buffer, so that a version spans two rounds
    seen = [device for version in range(5) for device in turns(devices, 3, version)]
    assert len(seen) == 5 * BUFFER_SIZE
    assert sorted(seen[:devices]) == list(range(devices)) == sorted(seen[devices:])
    assert seen != [device for version in range(5) for device in turns(devices, 4, version)]


def test_ranks_are_dealt_by_seed_and_keep_their_shares() -> None:
    assert sorted(dealt("uniform", 20, 0)) == sorted(MIXES["uniform"])
    assert dealt("uniform", 20, 0) == dealt("uniform", 20, 0) != dealt("uniform", 20, 1)
    assert all(len(ranks) == 20 for ranks in MIXES.values())


def test_nobody_trains_an_unseen_intent() -> None:
    clients = SmartHome().clients(0)
    trained = {intent(row) for task in clients.participants for row in task.train}
    unseen = {intent(row) for task in clients.unseen["other intent"] for row in task.test}
    assert len(trained) + len(unseen) == len(smart_home.INTENTS)
    assert unseen
    assert not unseen & trained


def test_from_version_0_a_state_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_training, "STEPS", 2)
    homes = SmartHome().clients(0).participants[:BUFFER_SIZE]
    few = Clients(tuple(Task(home.name, home.train[:8], home.test[:1]) for home in homes), {})
    federation = rules_training.Federation()
    published, innovation, carry = (
        federation.run(way, [2, 4, 8, 2], few, 0, [1]) for way in rules_grid.MAIN[:3]
    )
    assert innovation["losses"]["1"] == pytest.approx(published["losses"]["1"], rel=1e-4)
    assert carry["losses"]["1"] != pytest.approx(published["losses"]["1"], rel=1e-4)
    assert carry["upload_bytes"] == published["upload_bytes"] > carry["download_bytes"] == 0


def intent(record: Mapping[str, str]) -> str:
    return str(json.loads(record["completion"])["intent"])


def row(way: str, seed: int, seen: float, mix: str = "all 2") -> dict[str, Any]:
    losses = {"2": {"seen": seen, "near": 3.0, "far": 4.0}}
    return {"mix": mix, "way": way, "seed": seed, "versions": 2, "losses": losses}


def test_differences_are_of_the_same_seed() -> None:
    rows = [row(BASELINE, s, 2.0 + s) for s in range(3)] + [row("carry", s, 1.9 + s) for s in range(3)]
    found = difference(rows, Pairing("carry", ("all 2",)), "seen")
    assert found is not None
    assert found.values == pytest.approx((-0.1, -0.1, -0.1))
    assert found.half_width == pytest.approx(0.0, abs=1e-9)
    assert loss(rows[0], "unseen", "2") == 3.5


def test_equal_memory_is_compared_with_the_mix_that_has_it() -> None:
    rows = [row(BASELINE, 0, 2.0), row(BASELINE, 0, 1.8, "all 4"), row("carry", 0, 1.9)]
    wanted = [Pairing("carry", ("all 2",)), Pairing("carry", ("all 2",), "all 4")]
    assert pairings(rows) == wanted
    found = [difference(rows, pairing, "seen") for pairing in wanted]
    assert [round(one.mean, 6) for one in found if one] == [-0.1, 0.1]


def test_the_interval_is_students() -> None:
    rows = [row(BASELINE, s, 2.0) for s in range(3)] + [row("carry", s, 2.0 + s) for s in range(3)]
    found = difference(rows, Pairing("carry", ("all 2",)), "seen")
    assert found is not None
    assert found.mean == 1.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # standard deviation 1, n = 3


def test_a_seed_that_lacks_its_pair_does_not_count() -> None:
    rows = [row(BASELINE, 0, 2.0), row("carry", 0, 1.5), row("carry", 1, 9.0)]
    found = difference(rows, Pairing("carry", ("all 2",)), "seen")
    assert found is not None
    assert found.values == (-0.5,)
    assert found.half_width == math.inf
    assert difference(rows, Pairing("carry", ("all 2", "uniform")), "seen") is None
    assert differences_table(rows).row_count == 1


def test_the_log_finds_what_is_done_and_nothing_else(tmp_path: Path) -> None:
    case = Case("smart-home", "all 2", Way("carry", "fresh", 1e-3), 0, (1, 2))
    Results(tmp_path / "log", "rules", {}).get(case.key, lambda: {"losses": {}})
    log = Results(tmp_path / "log", "rules", {})
    assert log.find(case.key) == {"losses": {}}
    assert log.find(Case("smart-home", "all 2", Way("carry", "some", 1e-3), 0, (1, 2)).key) is None
    assert log.find(Case("smart-home", "all 2", Way("carry", "fresh", 1e-3), 0, (1, 3)).key) is None


def test_without_the_data_it_says_what_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rules.main(["--part", "training", "--data", str(tmp_path / "none.xz")]) == 2
    assert "Natural Instructions" in capsys.readouterr().err


def test_quick_toy_writes_all_rows_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "QUICK_VERSIONS", 2)
    arguments = ["--part", "toy", "--quick", "--json", str(tmp_path / "rows.json")]
    assert rules.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["toy"]
    wanted = sum(rules_toy.applies(way, mix) for way in rules_toy.WAYS for mix in rules_toy.MIXES)
    assert len(rows) == 2 * wanted
    assert toy_table(rows, "buffered").row_count == len(rules_toy.WAYS)


def test_clients_that_policies_were_tuned_on_are_in_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tuple((f"input {n}", f"output {n}") for n in range(9))
    made = [Client(n, "ABCDE"[n % 5], n, "", pairs[:3], pairs[3:]) for n in range(40)]
    monkeypatch.setattr(rules_clients, "read_clients", lambda path: made)
    monkeypatch.setattr(rules_clients, "eligible", lambda clients, wanted, tokens: clients)
    source = rules_clients.NaturalInstructions(Path("unread"), len)

    def drawn(seed: int) -> set[str]:
        tasks = source.many(10, 2, seed, tuned_on=(1000, 1001))
        assert [len(task.test) for task in tasks] == [2] * 10
        return {task.name for task in tasks}

    tuned_on = drawn(1000) | drawn(1001)
    assert 10 < len(tuned_on) <= 20
    for seed in range(5):
        assert len(drawn(seed)) == 10
        assert not drawn(seed) & tuned_on
