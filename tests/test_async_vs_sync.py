"""Buffered against synchronous federations: what is reported, what is compared, the real learner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import async_grid, async_report
from benchmarks.async_grid import Case, Grid, cases, drawn
from benchmarks.async_learning import Base, RealLearner
from benchmarks.async_policies import POLICIES, candidates, sweep_of_k, sweep_of_staleness
from benchmarks.async_report import BUFFERED, OVER, SYNCHRONOUS
from benchmarks.rules_clients import SmartHome
from benchmarks.rules_grid import Log
from benchmarks.virtual_federation import Work
from coordinator.events import Buffered, Merge

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


def test_the_interval_of_a_median_lies_within_the_values() -> None:
    found = async_report.bootstrapped([2.0, 3.0, 4.0, 5.0, 9.0])
    assert found.median == 4.0
    assert 2.0 <= found.low < 4.0 < found.high <= 9.0
    assert async_report.bootstrapped([3.0] * 5) == async_report.Estimate(3.0, 3.0, 3.0)


def test_devices_that_take_part_alike_all_count() -> None:
    assert async_report.effective_devices({"updates_by_device": [3, 3, 3, 0]}) == pytest.approx(3.0)


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


def test_policies_differ_in_their_mode_and_in_nothing_else_that_learns() -> None:
    buffered, rounds, over = (POLICIES[name] for name in (BUFFERED, SYNCHRONOUS, OVER))
    same = ("buffer_size", "quorum", "timeout_s", "server_learning_rate", "retry_s", "max_examples", "work_s")
    for name in same:
        assert getattr(buffered, name) == getattr(rounds, name) == getattr(over, name)
    assert rounds == replace(over, over_selection=0.0, lease_s=rounds.lease_s)
    assert over.round_size == 6
    assert buffered in sweep_of_k().values()
    assert buffered in sweep_of_staleness().values()
    assert all(policy in candidates().values() for policy in POLICIES.values())


def test_devices_of_a_seed_are_the_same_for_all_policies() -> None:
    clients = SmartHome().clients(0)
    assert drawn(clients, 0) == drawn(clients, 0) != drawn(clients, 1)


def test_a_grid_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def followed(case: Case, *_: object) -> dict[str, Any]:
        runs.append(case.label)
        return {"curve": [{"at_s": 0.0, "updates": 0, "loss": 4.0}], "seconds": 0.0}

    monkeypatch.setattr(async_grid, "followed", followed)
    monkeypatch.setattr(async_grid, "Base", object)
    monkeypatch.setattr(async_grid, "RealLearner", lambda *_: None)
    goal = async_report.Goal(0.8, 8)
    wanted = cases("smart-home", POLICIES, [0], goal)
    path = tmp_path / "log.jsonl"
    first = Grid(None, Log(path), lambda _: None).run(wanted)
    assert runs == list(POLICIES)
    again = Grid(None, Log(path), lambda _: None).run([*wanted, *cases("smart-home", POLICIES, [1], goal)])
    assert runs == [*POLICIES, *POLICIES]
    assert again[:3] == first
    assert [row["seed"] for row in again] == [0, 0, 0, 1, 1, 1]


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
