"""The plot of `benchmarks.async_vs_sync`: loss by virtual time, and time to the target by K and staleness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.asynchrony.report import (
    BUFFERED,
    FINISH,
    HOUR_S,
    OVER,
    OVER_FINISH,
    SYNCHRONOUS,
    Goal,
    by_policy,
    hours_of,
    loss_at,
)
from benchmarks.common.plotting import headless_pyplot

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = {
    BUFFERED: "#0072B2",
    SYNCHRONOUS: "#D55E00",
    OVER: "#E69F00",
    FINISH: "#009E73",
    OVER_FINISH: "#CC79A7",
}
HOURS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2, 3, 5, 10, 20, 50, 100)  # marked, where they are on the axis
NAMES = {
    BUFFERED: "buffered",
    SYNCHRONOUS: "rounds as published",
    OVER: "as published, 30 % over-selection",
    FINISH: "rounds with finish",
    OVER_FINISH: "with finish, 30 % over-selection",
}


def plot(
    rows: Sequence[Row],
    sweeps: Mapping[str, Mapping[str, Sequence[Row]]],
    goal: Goal,
    path: Path,
) -> None:
    """Draw the comparison.

    Args:
        rows: of the main comparison.
        sweeps: title -> value on the axis -> rows.
        goal: what is to be reached.
        path: of the PNG.
    """
    plotter = headless_pyplot()
    widths = [2.2, *(1.0 for _ in sweeps)]
    figure, axes = plotter.subplots(
        1, len(widths), figsize=(7.0 + 3.2 * len(sweeps), 4.4), squeeze=False, width_ratios=widths
    )
    _curves(axes[0][0], rows, goal)
    for axis, (title, values) in zip(axes[0][1:], sweeps.items(), strict=True):
        _times(axis, title, values, goal)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plotter.close(figure)


def _curves(axis: Any, rows: Sequence[Row], goal: Goal) -> None:
    """Mean over seeds of the newest version's loss over the base's, and the range of the seeds."""
    for label, found in by_policy(rows).items():
        if label not in COLOURS:
            continue
        first = max(row["curve"][1]["at_s"] for row in found)
        last = min(row["curve"][-1]["at_s"] for row in found)
        times = np.geomspace(first, max(last, first * 1.01), 200)
        losses = np.array([[loss_at(row, at_s) / row["curve"][0]["loss"] for at_s in times] for row in found])
        axis.plot(times / HOUR_S, losses.mean(axis=0), color=COLOURS[label], lw=2, label=NAMES[label])
        axis.fill_between(
            times / HOUR_S, losses.min(axis=0), losses.max(axis=0), color=COLOURS[label], alpha=0.15, lw=0
        )
    axis.axhline(goal.loss_share, color="black", lw=1, ls=":")
    where = ("axes fraction", "data")
    axis.annotate("target", (1, goal.loss_share), (-4, 4), where, "offset points", ha="right")
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xticks(ticks := [hours for hours in HOURS if low <= hours <= high], [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("virtual hours")
    axis.set_ylabel("held-out loss, as a share of the base's")
    axis.set_title("mean of the seeds, and their range")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, loc="lower left", fontsize=9)


def _times(axis: Any, title: str, values: Mapping[str, Sequence[Row]], goal: Goal) -> None:
    """A dot a seed, a bar at the median; an arrow for a run that did not get there."""
    seeds = sorted({row["seed"] for rows in values.values() for row in rows})
    for place, (_, rows) in enumerate(values.items()):
        hours = []
        for row in rows:
            until, reached = hours_of(row, goal)
            hours.append(until)
            shift = 0.12 * (seeds.index(row["seed"]) - fmean(range(len(seeds))))
            axis.scatter(
                place + shift, hours[-1], color=COLOURS[BUFFERED], marker="o" if reached else "^", s=28
            )
        axis.hlines(median(hours), place - 0.3, place + 0.3, color=COLOURS[BUFFERED], lw=2)
    axis.set_xticks(range(len(values)), list(values), fontsize=9)
    axis.set_xlim(-0.6, len(values) - 0.4)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    axis.set_title(title)
    axis.set_ylabel("virtual hours to the target")
    axis.grid(axis="y", alpha=0.3)
