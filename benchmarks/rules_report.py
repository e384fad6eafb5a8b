"""Tables, which are also Markdown, of the rows of `rules_toy` and `rules_training`; paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.rules_toy import MIXES as TOY_MIXES
from benchmarks.rules_toy import WAYS as TOY_WAYS

Row = dict[str, Any]

BASELINE = "flexlora"
MEGA = 1e6

# A carried component takes a sixteenth of a trained one: all 32 take what two more trained ones would.
EQUAL_MEMORY = {("all 2", "carry"): "all 4", ("all 2", "carry some"): "all 4"}

# Student's t for 95 % on both sides, by degrees of freedom: 1 to 9.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Difference:
    """Paired differences to the baseline, one a seed; below 0 is better than the baseline."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval of the mean (Student's t); infinite with one seed."""
        count = len(self.values)
        if count < 2:
            return math.inf
        return T_95[min(count - 1, len(T_95)) - 1] * stdev(self.values) / math.sqrt(count)

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def loss(row: Row, group: str, version: str) -> float:
    """Loss of `group` after `version`; `unseen` is the mean over all groups that nobody trained."""
    found = row["losses"][version]
    if group == "unseen":
        return fmean(value for name, value in found.items() if name != "seen")
    return float(found[group])


def difference(
    rows: Iterable[Row], way: str, mixes: Sequence[str], group: str, against: str | None = None
) -> Difference | None:
    """`way` less the baseline after the last version, by seed; the mean over `mixes` where they are several.

    The baseline has the same mix, or that of `against`. Only seeds that have both in all of `mixes` count;
    None if there is none.
    """
    by_key = {(row["mix"], row["way"], row["seed"]): row for row in rows}
    values = []
    for seed in sorted({seed for _, _, seed in by_key}):
        pairs = [
            (by_key.get((mix, way, seed)), by_key.get((against or mix, BASELINE, seed))) for mix in mixes
        ]
        found = [
            loss(ours, group, str(ours["versions"])) - loss(theirs, group, str(theirs["versions"]))
            for ours, theirs in pairs
            if ours and theirs
        ]
        if len(found) == len(mixes):
            values.append(fmean(found))
    return Difference(tuple(values)) if values else None


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _table(title: str, first: Sequence[str], others: Sequence[str]) -> Table:
    """A table that is Markdown on the screen: `first` are words, `others` numbers."""
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for column in first:
        table.add_column(column, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def toy_table(rows: Sequence[Row], mode: str) -> Table:
    """Relative errors, mean over seeds, of the rows of one mode."""
    mixes = [mix for mix in TOY_MIXES if any(row["mix"] == mix for row in rows)]
    found = {(r["mix"], r["way"]): fmean(r["errors"]) for r in rows if r["mode"] == mode}
    best = {mix: min(error for (m, _), error in found.items() if m == mix) for mix in mixes}
    table = _table(f"{mode}: relative error of the global matrix", ["rule"], mixes)
    for way in TOY_WAYS:
        cells = []
        for mix in mixes:
            error = found.get((mix, way))
            text = "–" if error is None else f"{error:.3f}"
            cells.append(f"**{text}**" if error == best[mix] else text)
        table.add_row(way, *cells)
    return table


def losses_table(rows: Sequence[Row]) -> Table:
    """Held-out losses after some versions, means over seeds, and the bytes beside them."""
    marks = list(rows[0]["losses"]) if rows else []
    unseen = [group for group in (rows[0]["base"] if rows else {}) if group != "seen"]
    columns = [*(f"seen, v{mark}" for mark in marks), *(f"{group}, v{marks[-1]}" for group in unseen)]
    table = _table(
        "Held-out loss (nats per token)",
        ["ranks", "rule"],
        ["seeds", *columns, "sent MB", "fetched MB", "factors MB", "s a step", "discarded"],
    )
    for mix in _in_order(row["mix"] for row in rows):
        for way in _in_order(row["way"] for row in rows if row["mix"] == mix):
            found = [row for row in rows if (row["mix"], row["way"]) == (mix, way)]
            cells = [f"{fmean(loss(r, 'seen', mark) for r in found):.3f}" for mark in marks]
            cells += [f"{fmean(loss(r, group, marks[-1]) for r in found):.3f}" for group in unseen]
            for name in ("upload_bytes", "download_bytes", "memory_bytes"):
                cells.append(f"{fmean(r[name] for r in found) / MEGA:.1f}")
            cells.append(f"{min(r['step_s'] for r in found):.2f}")
            cells.append(f"{fmean(r['energy_discarded'] for r in found):.1%}")
            table.add_row(mix, way, str(len(found)), *cells)
    return table


def differences_table(rows: Sequence[Row]) -> Table:
    """Every way against the baseline with the same ranks, clients, order and seeds."""
    mixes = [m for m in _in_order(row["mix"] for row in rows) if any(_others(rows, m))]
    table = _table(
        f"Less {BASELINE} of the same seed, after the last version: mean ± half of the 95 % interval",
        ["ranks", "rule"],
        ["seen", "each seed", "unseen", "each seed "],
    )
    for mix in mixes:
        for way in _others(rows, mix):
            _add_difference(table, mix, way, rows, [mix])
            equal = EQUAL_MEMORY.get((mix, way))
            if equal and difference(rows, way, [mix], "seen", equal):
                _add_difference(table, f"{mix}, against {equal}", way, rows, [mix], equal)
    for way in _in_order(row["way"] for row in rows):
        where = [m for m in mixes if way in _others(rows, m)]
        if way != BASELINE and len(where) > 1:
            _add_difference(table, "mean of " + ", ".join(where), way, rows, where)
    return table


def _others(rows: Sequence[Row], mix: str) -> list[str]:
    """The ways of a mix but for the baseline, if that was run with it."""
    ways = _in_order(row["way"] for row in rows if row["mix"] == mix)
    return [way for way in ways if way != BASELINE] if BASELINE in ways else []


def _add_difference(
    table: Table, label: str, way: str, rows: Sequence[Row], mixes: Sequence[str], against: str | None = None
) -> None:
    cells = []
    for group in ("seen", "unseen"):
        found = difference(rows, way, mixes, group, against)
        each = ", ".join(f"{value:+.3f}" for value in found.values) if found else ""
        cells += [str(found or "–"), each]
    table.add_row(label, way, *cells)
