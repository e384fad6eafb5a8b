"""What curves of loss by virtual time say: time to a target, losses at equal cost, speed-ups with intervals.

A row that did not reach the target is never left out. Its time counts as longer than all that was run: a
policy that is compared with it is at least that much faster, and one that did not get there itself is not
faster at all (a speed-up of 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any, Literal, get_args

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.rules.report import Difference

Row = dict[str, Any]
At = Literal["updates", "hour", "end"]  # where losses are compared; see `difference`
AT: tuple[At, ...] = get_args(At)

# Rounds as published (all of the work or nothing), with over-selection, and both with `finish`.
SYNCHRONOUS, OVER = "synchronous", "synchronous_over"
FINISH, OVER_FINISH = "synchronous_finish", "synchronous_over_finish"
BASELINES = (SYNCHRONOUS, OVER, FINISH, OVER_FINISH)
BUFFERED = "buffered"
RESAMPLES = 10_000
HOUR_S = 3600.0
WANTED_SPEEDUP = 3.0


@dataclass(frozen=True)
class Goal:
    """What federations are to reach. Seeds have other clients, and so other losses to begin with.

    `loss_share`: the target, as a share of the loss of the base alone. `updates`: after so many, losses are
    compared at equal work.
    """

    loss_share: float
    updates: int

    def target(self, row: Row) -> float:
        """The loss to reach (nats per token); the same for all policies of a seed."""
        return self.loss_share * float(row["curve"][0]["loss"])

    def time_s(self, row: Row) -> float | None:
        """Virtual seconds until a version of at most that loss was out; None: not in this run."""
        target = self.target(row)
        return next((float(point["at_s"]) for point in row["curve"] if point["loss"] <= target), None)

    def final(self, row: Row) -> Row:
        """The first version, of those looked at, that holds so many updates; else the last."""
        curve: list[Row] = row["curve"]
        return next((point for point in curve if point["updates"] >= self.updates), curve[-1])


def loss_at(row: Row, at_s: float) -> float:
    """Loss of the newest version, of those looked at, that was out by then."""
    return float([point["loss"] for point in row["curve"] if point["at_s"] <= at_s][-1])


def speedups(ours: Sequence[Row], theirs: Sequence[Row], goal: Goal) -> list[float]:
    """How many times sooner ours reach the target, seed by seed, with lower bounds where theirs never do."""
    by_seed = {row["seed"]: row for row in theirs}
    found = []
    for row in ours:
        own, other = goal.time_s(row), by_seed[row["seed"]]
        theirs_s = goal.time_s(other) or other["ended_s"]
        found.append(theirs_s / own if own else 0.0)
    return found


@dataclass(frozen=True)
class Estimate:
    """A median over seeds and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f} to {self.high:.1f})"


def bootstrapped(values: Sequence[float], seed: int = 0) -> Estimate:
    """Median of paired values, with the percentile interval of resampled seeds (Efron 1979, Ann. Statist. 7).

    With few seeds an interval of medians can be no wider than the values themselves.
    """
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Estimate(median(values), float(low), float(high))


def by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by label, in the order of their first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["policy"], []).append(row)
    return found


def effective_devices(row: Row) -> float:
    """(Σn)² / Σn² of the updates of each device (Kish): as many devices as if all took part alike."""
    counts = np.asarray(row["updates_by_device"], float)
    return float(counts.sum() ** 2 / (counts**2).sum())


def difference(ours: Sequence[Row], theirs: Sequence[Row], goal: Goal, at: At) -> Difference:
    """Loss less theirs, seed by seed.

    `at`: after equal `updates`; at the `hour` at which ours has so many; or ours at the `end` of its run and
    theirs after the goal's updates.
    """
    by_seed = {row["seed"]: row for row in theirs}
    values = []
    for row in ours:
        now, other = row["curve"][-1] if at == "end" else goal.final(row), by_seed[row["seed"]]
        their_loss = loss_at(other, now["at_s"]) if at == "hour" else goal.final(other)["loss"]
        values.append(now["loss"] - their_loss)
    return Difference(tuple(values))


def hours_saved(ours: Sequence[Row], theirs: Sequence[Row], goal: Goal) -> float:
    """How many times sooner ours end than theirs have the goal's updates; median of the seeds."""
    by_seed = {row["seed"]: row for row in theirs}
    return median(goal.final(by_seed[row["seed"]])["at_s"] / row["curve"][-1]["at_s"] for row in ours)


def summary_table(rows: Sequence[Row], goal: Goal, title: str = "policy") -> Table:
    """One line a policy; hours are virtual, their medians over seeds with the range."""
    labels = by_policy(rows)
    heading = f"Until {goal.loss_share:.0%} of the base's held-out loss"
    table = Table(title=heading, title_justify="left", box=box.MARKDOWN)
    table.add_column(title, no_wrap=True)
    n = goal.updates
    columns = ["seeds", "reached", "hours", "times sooner", f"loss, {n} updates", f"hours, {n} updates"]
    columns += ["updates", "loss, end", "hours, end"]
    columns += ["staleness", "devices", "lost", "in vain"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for label, found in labels.items():
        table.add_row(label, *_cells(found, labels.get(SYNCHRONOUS, []), goal))
    return table


def _cells(rows: Sequence[Row], reference: Sequence[Row], goal: Goal) -> list[str]:
    """The numbers of a policy."""
    hours = [seconds / HOUR_S for row in rows if (seconds := goal.time_s(row))]
    granted = sum(row["counts"]["granted"] for row in rows)
    ends, lasts = [goal.final(row) for row in rows], [row["curve"][-1] for row in rows]
    comparable = {row["seed"] for row in rows} <= {row["seed"] for row in reference}
    return [
        str(len(rows)),
        f"{len(hours)}/{len(rows)}",
        f"{median(hours):.2f} ({min(hours):.2f} to {max(hours):.2f})" if hours else "–",
        str(bootstrapped(speedups(rows, reference, goal))) if comparable else "–",
        f"{fmean(end['loss'] for end in ends):.3f}",
        f"{median(end['at_s'] for end in ends) / HOUR_S:.2f}",
        f"{fmean(last['updates'] for last in lasts):.0f}",
        f"{fmean(last['loss'] for last in lasts):.3f}",
        f"{median(last['at_s'] for last in lasts) / HOUR_S:.2f}",
        f"{fmean(tau for row in rows for tau in row['staleness']):.1f}",
        f"{fmean(effective_devices(row) for row in rows):.1f}",
        f"{sum(row['counts'].get('lost', 0) for row in rows) / granted:.0%}",
        f"{sum(row['wasted_s'] for row in rows) / sum(row['trained_s'] for row in rows):.0%}",
    ]


def targets_table(rows: Sequence[Row], goal: Goal, shares: Sequence[float]) -> Table:
    """How many times sooner buffers reach other targets: medians, and how many of all runs arrived at all."""
    labels = by_policy(rows)
    table = Table(title="Times sooner, by target", title_justify="left", box=box.MARKDOWN)
    for column in ("target", *BASELINES, "arrived"):
        table.add_column(column, justify="right", no_wrap=True)
    for share in shares:
        other = replace(goal, loss_share=share)
        cells = [str(bootstrapped(speedups(labels[BUFFERED], labels[name], other))) for name in BASELINES]
        arrived = [sum(other.time_s(row) is not None for row in labels[n]) for n in (BUFFERED, *BASELINES)]
        table.add_row(f"{share:.0%}", *cells, ", ".join(map(str, arrived)))
    return table


def verdict(rows: Sequence[Row], goal: Goal) -> str:
    """The result in words."""
    labels = by_policy(rows)
    ours, lines = labels[BUFFERED], []
    for name in BASELINES:
        theirs = labels[name]
        each = speedups(ours, theirs, goal)
        found = bootstrapped(each)
        never = sum(goal.time_s(row) is None for row in theirs)
        bounds = f"; {never} of {len(theirs)} are lower bounds, it had not arrived" if never else ""
        after, same, end = (difference(ours, theirs, goal, at) for at in AT)
        sooner = hours_saved(ours, theirs, goal)
        reached = "reached" if found.median >= WANTED_SPEEDUP else "not reached"
        lines.append(
            f"buffered reaches the target {found} times sooner than {name} (median, 95 % bootstrap interval "
            f"of {len(each)} paired seeds: {', '.join(f'{one:.1f}' for one in each)}{bounds}); "
            f"goal of {WANTED_SPEEDUP:g} times: {reached}; "
            f"loss after {goal.updates} updates {after}, at the same hour {same}, at the end of its run "
            f"({sooner:.1f} times sooner than {name} has {goal.updates} updates) {end}"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], goal: Goal) -> Row:
    """The numbers for machines."""
    labels = by_policy(rows)
    kept = ("curve", "counts", "updates_by_device", "staleness", "devices", "settings")
    found: Row = {"loss_share": goal.loss_share, "updates": goal.updates, "rows": []}
    for row in rows:
        reached = goal.time_s(row)
        end = goal.final(row)
        found["rows"].append(
            {
                "policy": row["policy"],
                "seed": row["seed"],
                "time_to_target_s": reached,
                "censored_at_s": None if reached else row["ended_s"],
                "target_loss": goal.target(row),
                "final_loss": end["loss"],
                "final_s": end["at_s"],
                "end_loss": row["curve"][-1]["loss"],
                "end_s": row["curve"][-1]["at_s"],
                **{name: row[name] for name in kept},
            }
        )
    found["speedups"] = {}
    for name in BASELINES:
        if BUFFERED in labels and name in labels:
            each = speedups(labels[BUFFERED], labels[name], goal)
            found["speedups"][name] = {**asdict(bootstrapped(each)), "each": each}
    if sooner := found["speedups"].get(SYNCHRONOUS):
        found |= {f"speedup_{part}": sooner[part] for part in ("median", "low", "high")}
    return found


def hours_of(row: Row, goal: Goal) -> tuple[float, bool]:
    """Virtual hours to the target and True, or to the end of a run that did not get there and False."""
    reached = goal.time_s(row)
    seconds = row["ended_s"] if reached is None else reached
    assert math.isfinite(seconds)
    return seconds / HOUR_S, reached is not None
