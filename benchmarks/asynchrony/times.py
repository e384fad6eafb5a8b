"""How soon updates come under each deadline and policy, without any learning.


It shows whether the comparison depends on the deadline that was chosen for it, and who takes part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.asynchrony.devices import draw
from benchmarks.asynchrony.grid import DEVICES, federation_of
from benchmarks.asynchrony.learning import TRAINING
from benchmarks.asynchrony.policies import Way, compared
from benchmarks.asynchrony.report import BASELINES, BUFFERED, HOUR_S, effective_devices
from benchmarks.asynchrony.simulation import Work
from benchmarks.rules.grid import dealt
from coordinator.engine.events import Merge

Row = dict[str, Any]

DEADLINES_S = (150.0, 300.0, 600.0, 900.0, 1800.0, 3600.0)
MOST_S = 60 * 24 * 3600.0


@dataclass
class Nothing:
    """Learns nothing; counts steps."""

    steps: int = 0

    def train(self, work: Work) -> int:
        """Count."""
        self.steps += work.steps
        return work.steps * TRAINING.batch

    def merge(self, effect: Merge) -> int:
        """A version of some rank."""
        return 1


def timed(way: Way, seed: int, updates: int) -> Row:
    """Hours until so many updates are merged, steps of each, and who sent them."""
    devices = draw(dealt("uniform", DEVICES, seed), TRAINING.steps, seed)
    learner = Nothing()
    federation = federation_of(way, devices, learner, seed)
    trace = federation.trace
    federation.run(lambda _: trace.merged >= updates, MOST_S)
    counts = Counter(device for version in trace.versions for device in version.devices)
    by_device = [counts[place] for place in range(DEVICES)]
    return {
        "seed": seed,
        "hours": federation.now / HOUR_S,
        "steps": learner.steps / max(1, trace.counts["delivered"]),
        "devices": effective_devices({"updates_by_device": by_device}),
    }


def table(seeds: Sequence[int], updates: int) -> Table:
    """One line a deadline: medians over seeds, and how many times sooner buffers are."""
    columns = list(compared())
    found = Table(
        title=f"Virtual hours until {updates} updates are merged (devices that take part as if alike; steps)",
        title_justify="left",
        box=box.MARKDOWN,
    )
    found.add_column("deadline, s", justify="right")
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("buffered sooner", justify="right")
    for lease_s in DEADLINES_S:
        ways = compared(lease_s=lease_s)
        rows = {name: [timed(way, seed, updates) for seed in seeds] for name, way in ways.items()}
        found.add_row(f"{lease_s:g}", *(_cell(rows[name]) for name in columns), _sooner(rows))
    return found


def _cell(rows: Sequence[Row]) -> str:
    hours, devices, steps = (
        median(row["hours"] for row in rows),
        fmean(row["devices"] for row in rows),
        fmean(row["steps"] for row in rows),
    )
    return f"{hours:.2f} ({devices:.0f}; {steps:.1f})"


def _sooner(rows: Mapping[str, Sequence[Row]]) -> str:
    """Than each kind of rounds."""
    ratios = [
        median(
            theirs["hours"] / ours["hours"] for ours, theirs in zip(rows[BUFFERED], rows[name], strict=True)
        )
        for name in BASELINES
    ]
    return " / ".join(f"{ratio:.1f}" for ratio in ratios)
