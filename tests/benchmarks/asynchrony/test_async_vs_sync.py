"""Buffered against synchronous federations: what is reported, what is compared, the real learner."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.asynchrony import grid as async_grid
from benchmarks.asynchrony import plots as async_plots
from benchmarks.asynchrony import report as async_report
from benchmarks.asynchrony.comparison import SWEEPS
from benchmarks.asynchrony.grid import Case, Grid, cases, drawn
from benchmarks.asynchrony.learning import RealLearner
from benchmarks.asynchrony.policies import Way, candidates, compared
from benchmarks.asynchrony.report import BASELINES, BUFFERED, FINISH, OVER, OVER_FINISH, SYNCHRONOUS
from benchmarks.asynchrony.simulation import Work
from benchmarks.common.clients import SmartHome
from benchmarks.common.federation import Base
from benchmarks.common.results import Results
from coordinator.engine.events import Buffered, Merge

# --- what is reported ---


GOAL = async_report.Goal(loss_share=0.75, updates=9)


def curve(seed: int, *points: tuple[float, int, float]) -> dict[str, Any]:
    return {
        "policy": "buffered",
        "seed": seed,
        "ended_s": points[-1][0],
        "curve": [{"at_s": at_s, "updates": updates, "loss": loss} for at_s, updates, loss in points],
    }


def test_a_run_that_never_arrives_bounds_the_speed_up() -> None:
    fast = curve(0, (0, 0, 4.0), (10, 8, 3.0), (20, 16, 2.5))
    slow = curve(0, (0, 0, 4.0), (100, 8, 3.5), (400, 16, 2.9))
    assert GOAL.target(fast) == 3.0
    assert GOAL.time_s(fast) == 10
    assert async_report.speedups([fast], [slow], GOAL) == [40.0]
    lower = replace(GOAL, loss_share=0.7)
    assert async_report.speedups([fast], [slow], lower) == [
        20.0
    ]  # at least: the other had not arrived at 400
    assert async_report.speedups([slow], [fast], lower) == [0.0]
    assert async_report.hours_of(slow, lower) == (400 / 3600, False)
    assert GOAL.final(fast)["loss"] == 2.5
    assert async_report.loss_at(slow, 399) == 3.5
    assert async_report.difference([fast], [slow], GOAL, "updates").values == (pytest.approx(2.5 - 2.9),)
    assert async_report.difference([fast], [slow], GOAL, "hour").values == (pytest.approx(2.5 - 4.0),)
    longer = curve(0, (0, 0, 4.0), (10, 8, 3.0), (20, 16, 2.5), (40, 24, 2.4))
    assert async_report.difference([longer], [slow], GOAL, "end").values == (pytest.approx(2.4 - 2.9),)
    assert async_report.hours_saved([longer], [slow], GOAL) == 10.0


def test_the_interval_of_a_median_lies_within_the_values() -> None:
    found = async_report.bootstrapped([2.0, 3.0, 4.0, 5.0, 9.0])
    assert found.median == 4.0
    assert 2.0 <= found.low < 4.0 < found.high <= 9.0
    assert async_report.bootstrapped([3.0] * 5) == async_report.Estimate(3.0, 3.0, 3.0)


def test_devices_that_take_part_alike_all_count() -> None:
    assert async_report.effective_devices({"updates_by_device": [3, 3, 3, 0]}) == pytest.approx(3.0)


def test_the_table_of_targets_counts_who_arrived() -> None:
    rows = [curve(0, (0, 0, 4.0), (10, 8, 3.0), (20, 16, 2.5))]
    rows += [curve(0, (0, 0, 4.0), (100, 8, 2.9)) | {"policy": name} for name in BASELINES]
    table = async_report.targets_table(rows, GOAL, (0.75, 0.7))
    assert list(table.columns[1].cells) == ["10.0 (10.0 to 10.0)", "5.0 (5.0 to 5.0)"]
    assert list(table.columns[-1].cells) == ["1, 1, 1, 1, 1", "1, 0, 0, 0, 0"]


def test_a_row_says_when_it_was_censored() -> None:
    fast, slow = curve(0, (0, 0, 4.0), (10, 8, 2.5)), curve(0, (0, 0, 4.0), (400, 16, 3.9))
    more = {
        "counts": {"granted": 1},
        "updates_by_device": [1],
        "staleness": [0],
        "devices": [],
        "settings": {},
    }
    found = async_report.as_json([fast | more, slow | more | {"policy": SYNCHRONOUS}], GOAL)
    rows = found["rows"]
    assert [(r["time_to_target_s"], r["censored_at_s"]) for r in rows] == [(10.0, None), (None, 400)]
    assert [r["final_loss"] for r in rows] == [2.5, 3.9]
    assert found["speedup_median"] == found["speedup_low"] == found["speedup_high"] == 40.0
    json.dumps(found)


# --- what is compared ---


@pytest.mark.parametrize("k", [4, 16])
def test_ways_differ_in_their_mode_and_in_nothing_else_that_learns(k: int) -> None:
    ways = compared(k)
    assert list(ways) == [BUFFERED, *BASELINES]
    rounds = ways[SYNCHRONOUS].policy
    assert ways[BUFFERED] == Way(replace(rounds, mode="buffered"), longer=2)
    assert ways[FINISH] == Way(rounds)
    assert ways[OVER] == replace(ways[OVER_FINISH], partial=False)
    assert ways[OVER].policy == replace(rounds, over_selection=0.3)
    assert rounds.round_size == rounds.buffer_size == k
    assert ways[OVER].policy.round_size == math.ceil(1.3 * k)


def test_what_is_compared_is_among_the_candidates_and_in_every_sweep() -> None:
    ways = compared() | {BUFFERED: replace(compared()[BUFFERED], longer=1)}
    for sweep in SWEEPS.values():
        assert ways[BUFFERED] in sweep().values()
    assert all(ways[name] in candidates().values() for name in (BUFFERED, SYNCHRONOUS, FINISH))


def test_a_way_that_is_watched_for_longer_is_another_case() -> None:
    goal = async_report.Goal(0.8, 8)
    short, long = (Case("smart-home", "x", Way(compared()[OVER].policy, True, n), 0, goal) for n in (1, 2))
    assert short.key != long.key
    assert (short.updates, long.updates, short.most_updates) == (8, 16, 16)


def test_every_policy_has_a_colour_and_a_name_in_the_plot() -> None:
    assert list(async_plots.COLOURS) == list(async_plots.NAMES) == list(compared())


def test_devices_of_a_seed_are_the_same_for_all_policies() -> None:
    assert drawn(5, 0) == drawn(5, 0) != drawn(5, 1)
    assert len(drawn(40, 0)) == 40


def test_a_grid_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def followed(case: Case, *_: object) -> dict[str, Any]:
        runs.append(case.label)
        return {"curve": [{"at_s": 0.0, "updates": 0, "loss": 4.0}], "seconds": 0.0}

    monkeypatch.setattr(async_grid, "followed", followed)
    monkeypatch.setattr(async_grid, "Base", object)
    monkeypatch.setattr(async_grid, "RealLearner", lambda *_: None)
    goal = async_report.Goal(0.8, 8)
    ways = compared()
    wanted = cases("smart-home", ways, [0], goal)
    path = tmp_path / "log.jsonl"

    def grid() -> Grid:
        return Grid(None, Results(path, "async_vs_sync", {}), lambda _: None)

    first = grid().run(wanted)
    assert runs == list(ways)
    again = grid().run([*wanted, *cases("smart-home", ways, [1], goal)])
    assert runs == [*ways, *ways]
    assert again[: len(ways)] == first
    assert [row["seed"] for row in again] == [0] * len(ways) + [1] * len(ways)


# --- the real learner ---


def test_the_learner_trains_and_merges_and_does_it_the_same_way_again(tmp_path: Path) -> None:
    base, clients = Base(), SmartHome().clients(0).participants[:2]
    losses = []
    for attempt in range(2):
        learner = RealLearner(base, clients, tmp_path / str(attempt), 1.0, seed=5)
        for place in range(2):
            assert learner.train(Work(f"u{place}", place, 0, 4, 0, steps=6)) == 24
        updates = tuple((Buffered(f"u{place}", f"d{place}", 0, 24), 0.5, 0) for place in range(2))
        assert learner.merge(Merge(1, updates)) == 8
        losses.append((learner.loss(0), learner.loss(1)))
    assert losses[0] == losses[1]
    assert losses[0][1] < 0.9 * losses[0][0]
