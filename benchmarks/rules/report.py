"""Tables, which are also Markdown, of the rows of `rules_toy` and `rules_training`; paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.rules.toy import MIXES as TOY_MIXES
from benchmarks.rules.toy import WAYS as TOY_WAYS

Row = dict[str, Any]

BASELINE = "flexlora"
GROUPS = ("seen", "unseen")
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


@dataclass(frozen=True)
class Pairing:
    """What is compared: a way with the baseline of the same mix, or of the mix `against`.

    With several mixes the difference of a seed is their mean.
    """

    way: str
    mixes: tuple[str, ...]
    against: str | None = None

    @property
    def label(self) -> str:
        """Whose ranks these are."""
        if len(self.mixes) > 1:
            return "mean of " + ", ".join(self.mixes)
        return self.mixes[0] + (f", against {self.against}" if self.against else "")


def loss(row: Row, group: str, version: str) -> float:
    """Loss of `group` after `version`; `unseen` is the mean over all groups that nobody trained."""
    found = row["losses"][version]
    if group == "unseen":
        return fmean(value for name, value in found.items() if name != "seen")
    return float(found[group])


def difference(
    rows: Iterable[Row], pairing: Pairing, group: str, version: str | None = None
) -> Difference | None:
    """The way less the baseline after `version` (None: the last), by seed.

    Only seeds that have both in all mixes count; None if there is none.
    """
    by_key = {(row["mix"], row["way"], row["seed"]): row for row in rows}
    values = []
    for seed in sorted({seed for _, _, seed in by_key}):
        pairs = [
            (by_key.get((mix, pairing.way, seed)), by_key.get((pairing.against or mix, BASELINE, seed)))
            for mix in pairing.mixes
        ]
        found = [
            loss(ours, group, version or str(ours["versions"]))
            - loss(theirs, group, version or str(theirs["versions"]))
            for ours, theirs in pairs
            if ours and theirs
        ]
        if len(found) == len(pairs):
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


def pairings(rows: Sequence[Row]) -> list[Pairing]:
    """All that can be compared: mix by mix, against equal memory, then over all mixes of a way."""
    mixes = [m for m in _in_order(row["mix"] for row in rows) if any(_others(rows, m))]
    found = []
    for mix in mixes:
        for way in _others(rows, mix):
            found.append(Pairing(way, (mix,)))
            equal = EQUAL_MEMORY.get((mix, way))
            if equal and any((row["mix"], row["way"]) == (equal, BASELINE) for row in rows):
                found.append(Pairing(way, (mix,), equal))
    for way in _in_order(row["way"] for row in rows):
        where = tuple(mix for mix in mixes if way in _others(rows, mix))
        if len(where) > 1:
            found.append(Pairing(way, where))
    return found


def differences_table(rows: Sequence[Row]) -> Table:
    """Every way against the baseline with the same clients, order and seeds."""
    marks = list(rows[0]["losses"]) if rows else []
    columns = [f"{group}, {what}" for group in GROUPS for what in (*(f"v{m}" for m in marks), "each seed")]
    table = _table(
        f"Less {BASELINE} of the same seed: mean ± half of the 95 % interval; each seed, at the end",
        ["ranks", "rule"],
        columns,
    )
    for pairing in pairings(rows):
        cells = []
        for group in GROUPS:
            found = [difference(rows, pairing, group, mark) for mark in marks]
            each = found[-1].values if found[-1] else ()
            cells += [str(one or "–") for one in found]
            cells.append(", ".join(f"{value:+.3f}" for value in each))
        table.add_row(pairing.label, pairing.way, *cells)
    return table


def _others(rows: Sequence[Row], mix: str) -> list[str]:
    """The ways of a mix but for the baseline, if that was run with it."""
    ways = _in_order(row["way"] for row in rows if row["mix"] == mix)
    return [way for way in ways if way != BASELINE] if BASELINE in ways else []
