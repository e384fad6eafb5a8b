"""What curves of loss against virtual time say: time to a target, losses at equal cost, speed-ups with intervals.

A row that did not reach the target is never left out. Its time counts as longer than all that was run: a
policy that is compared with it is at least that much faster, and one that did not get there itself is not
faster at all (a speed-up of 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

Row = dict[str, Any]

SYNCHRONOUS, OVER, BUFFERED = "synchronous", "synchronous_over", "buffered"
RESAMPLES = 10_000
HOUR_S = 3600.0


def time_to(row: Row, target: float) -> float | None:
    """Virtual seconds until a version of at most this loss was out; None: never, in this run."""
    return next((float(point["at_s"]) for point in row["curve"] if point["loss"] <= target), None)


def loss_after(row: Row, updates: int) -> float:
    """Loss of the first version, of those looked at, that holds so many updates; else of the last."""
    found = (point["loss"] for point in row["curve"] if point["updates"] >= updates)
    return float(next(found, row["curve"][-1]["loss"]))


def time_after(row: Row, updates: int) -> float:
    """When that version was out."""
    found = (point["at_s"] for point in row["curve"] if point["updates"] >= updates)
    return float(next(found, row["curve"][-1]["at_s"]))


def loss_at(row: Row, at_s: float) -> float:
    """Loss of the newest version, of those looked at, that was out by then."""
    return float([point["loss"] for point in row["curve"] if point["at_s"] <= at_s][-1])


def speedups(ours: Sequence[Row], theirs: Sequence[Row], target: float) -> list[float]:
    """How many times sooner ours reach the target, seed by seed, with lower bounds where theirs never do."""
    by_seed = {row["seed"]: row for row in theirs}
    found = []
    for row in ours:
        own, other = time_to(row, target), by_seed[row["seed"]]
        theirs_s = time_to(other, target) or other["ended_s"]
        found.append(theirs_s / own if own else 0.0)
    return found


@dataclass(frozen=True)
class Estimate:
    """A median over seeds and its 95 % interval."""

    median: float
    low: float
    high: float


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


def summary_table(rows: Sequence[Row], target: float, updates: int) -> Table:
    """One line a policy."""
    labels = by_policy(rows)
    reference = labels.get(SYNCHRONOUS, [])
    table = Table(title=f"Until a held-out loss of {target:g} nats", title_justify="left", box=box.MARKDOWN)
    table.add_column("policy", no_wrap=True)
    for column in (
        "seeds",
        "reached",
        "hours",
        "times sooner",
        f"loss, {updates} updates",
        f"hours, {updates} updates",
        "loss, same hour",
        "lost",
        "for nothing",
        "devices",
        "staleness",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for label, found in labels.items():
        table.add_row(label, *_cells(found, reference, labels.get(BUFFERED, found), (target, updates)))
    return table


def _cells(
    rows: Sequence[Row], reference: Sequence[Row], buffered: Sequence[Row], wanted: tuple[float, int]
) -> list[str]:
    """The numbers of a policy."""
    target, updates = wanted
    times = [time_to(row, target) for row in rows]
    hours = [seconds / HOUR_S for seconds in times if seconds]
    same = {row["seed"]: time_after(row, updates) for row in buffered}
    granted = sum(row["counts"]["granted"] for row in rows)
    return [
        str(len(rows)),
        f"{len(hours)}/{len(rows)}",
        f"{median(hours):.2f} ({min(hours):.2f} to {max(hours):.2f})" if hours else "–",
        _sooner(rows, reference, target),
        f"{fmean(loss_after(row, updates) for row in rows):.3f}",
        f"{median(time_after(row, updates) for row in rows) / HOUR_S:.2f}",
        f"{fmean(loss_at(row, same[row['seed']]) for row in rows if row['seed'] in same):.3f}",
        f"{sum(row['counts'].get('lost', 0) for row in rows) / granted:.0%}",
        f"{sum(row['wasted_s'] for row in rows) / sum(row['trained_s'] for row in rows):.0%}",
        f"{fmean(effective_devices(row) for row in rows):.1f}",
        f"{fmean(tau for row in rows for tau in row['staleness']):.1f}",
    ]


def _sooner(rows: Sequence[Row], reference: Sequence[Row], target: float) -> str:
    seeds = {row["seed"] for row in reference}
    if not reference or not {row["seed"] for row in rows} <= seeds:
        return "–"
    found = bootstrapped(speedups(rows, reference, target))
    return f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f})"


def differences(ours: Sequence[Row], theirs: Sequence[Row], updates: int) -> list[float]:
    """Loss after so many updates, ours less theirs, seed by seed."""
    by_seed = {row["seed"]: row for row in theirs}
    return [loss_after(row, updates) - loss_after(by_seed[row["seed"]], updates) for row in ours]


def as_json(rows: Sequence[Row], target: float, updates: int) -> Row:
    """The numbers for machines."""
    labels = by_policy(rows)
    found: Row = {"target": target, "updates": updates, "rows": []}
    for row in rows:
        reached = time_to(row, target)
        found["rows"].append(
            {
                "policy": row["policy"],
                "seed": row["seed"],
                "time_to_target_s": reached,
                "censored_at_s": None if reached else row["ended_s"],
                "final_loss": loss_after(row, updates),
                "final_s": time_after(row, updates),
                **{name: row[name] for name in ("curve", "counts", "updates_by_device", "settings")},
            }
        )
    ours, theirs = labels.get(BUFFERED), labels.get(SYNCHRONOUS)
    if ours and theirs:
        sooner = bootstrapped(speedups(ours, theirs, target))
        found |= {"speedup_median": sooner.median, "speedup_low": sooner.low, "speedup_high": sooner.high}
        found["speedups"] = speedups(ours, theirs, target)
        found["final_loss_differences"] = differences(ours, theirs, updates)
    return found
