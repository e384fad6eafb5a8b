"""The plots of `benchmarks.rules`: errors on the synthetic target, and losses of real training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.plotting import headless_pyplot
from benchmarks.rules.report import BASELINE, EQUAL_MEMORY, Pairing, difference, loss
from benchmarks.rules.toy import MIXES, MOST_STALE, WAYS

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = {
    "flexlora": "#000000",
    "innovation": "#E69F00",
    "carry": "#0072B2",
    "carry some": "#56B4E9",
    "hetlora": "#CC79A7",
    "flora": "#009E73",
    "fedit": "#D55E00",
}


def plot_toy(rows: Sequence[Row], path: Path) -> None:
    """Bars of the mean error over seeds, by ranks and rule, synchronous and buffered."""
    pyplot = headless_pyplot()
    modes = [mode for mode in MOST_STALE if any(row["mode"] == mode for row in rows)]
    figure, axes = pyplot.subplots(1, len(modes), figsize=(5.5 * len(modes), 4.2), sharey=True, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        found = {(r["mix"], r["way"]): fmean(r["errors"]) for r in rows if r["mode"] == mode}
        width = 0.8 / len(WAYS)
        for place, way in enumerate(WAYS):
            points = [(i, found[mix, way]) for i, mix in enumerate(MIXES) if (mix, way) in found]
            left = [i + (place - (len(WAYS) - 1) / 2) * width for i, _ in points]
            axis.bar(left, [e for _, e in points], width, color=COLOURS[way], label=way)
        axis.set_yscale("log")
        axis.set_xticks(range(len(MIXES)), list(MIXES))
        axis.set_yticks([0.07, 0.1, 0.2, 0.4, 0.6], ["0.07", "0.1", "0.2", "0.4", "0.6"])
        axis.minorticks_off()
        axis.set_ylim(0.06, 0.8)
        axis.set_title(mode)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("relative error of the global matrix")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(WAYS), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_training(rows: Sequence[Row], path: Path) -> None:
    """Above, losses of seen clients by version; below, each seed's difference to the baseline at the end."""
    pyplot = headless_pyplot()
    compared = {row["mix"] for row in rows if row["way"] != BASELINE}
    mixes = [mix for mix in dict.fromkeys(row["mix"] for row in rows) if mix in compared]
    figure, axes = pyplot.subplots(2, len(mixes), figsize=(4.2 * len(mixes), 7), squeeze=False, sharey="row")
    for column, mix in enumerate(mixes):
        own = [row for row in rows if row["mix"] == mix]
        ways = [way for way in COLOURS if any(row["way"] == way for row in own)]
        for way in ways:
            _curve(axes[0][column], [row for row in own if row["way"] == way], way)
        if equal := [row for row in rows if row["mix"] == EQUAL_MEMORY.get((mix, "carry"))]:
            _curve(axes[0][column], equal, BASELINE, label=f"{BASELINE}, {equal[0]['mix']}", linestyle="--")
        _dots(axes[1][column], own, [way for way in ways if way != BASELINE])
        axes[0][column].set_title(mix)
        axes[0][column].set_xlabel("version")
    axes[0][0].set_ylabel("held-out loss, clients that train")
    axes[1][0].set_ylabel(f"loss less that of {BASELINE}, last version")
    handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curve(axis: Any, rows: Sequence[Row], way: str, **line: str) -> None:
    """Mean over seeds by version."""
    marks = list(rows[0]["losses"])
    means = [fmean(loss(row, "seen", mark) for row in rows) for mark in marks]
    axis.plot([int(m) for m in marks], means, marker="o", color=COLOURS[way], **({"label": way} | line))
    axis.set_xticks([int(m) for m in marks])
    axis.grid(alpha=0.3)


def _dots(axis: Any, rows: Sequence[Row], ways: Sequence[str]) -> None:
    """One dot a seed, a bar at the mean: clients that train, and tasks that nobody trains."""
    for place, way in enumerate(ways):
        for shift, group, marker in ((-0.15, "seen", "o"), (0.15, "unseen", "^")):
            found = difference(rows, Pairing(way, (rows[0]["mix"],)), group)
            if found is None:
                continue
            x = [place + shift] * len(found.values)
            axis.scatter(x, found.values, color=COLOURS[way], marker=marker, s=28, alpha=0.8)
            axis.hlines(found.mean, place + shift - 0.1, place + shift + 0.1, color=COLOURS[way], lw=2)
    axis.axhline(0, color=COLOURS[BASELINE], lw=1)
    axis.set_xticks(range(len(ways)), ways, fontsize=8)
    axis.set_xlim(-0.6, len(ways) - 0.4)
    axis.grid(axis="y", alpha=0.3)
    axis.set_title("○ clients that train, △ tasks that nobody trains", fontsize=8)
