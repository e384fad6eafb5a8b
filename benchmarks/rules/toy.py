"""Every rule on the target whose answer is known (`carry_toy`), in federations of equal and unequal ranks.

What is measured is the relative error of the global matrix, and what devices sent and held for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.carry import toy as carry_toy
from benchmarks.carry.toy import DEVICES, RANK_CAP, WIDTH, Rules, Split
from coordinator.rules.named import rule_named
from edge_sdk.core.flexlora import FRESH_ROWS

Row = dict[str, Any]

# 80 devices: all of one rank, or in the shares of the FlexLoRA paper's types.
MIXES: dict[str, tuple[int, ...]] = {
    "all 16": (16,) * DEVICES,
    "heavy-tail-light": (2,) * 64 + (4,) * 6 + (8,) * 5 + (16,) * 5,
    "uniform": (2, 4, 8, 16) * 20,
    "all 2": (2,) * DEVICES,
}
MOST_STALE = {"synchronous": 0, "buffered": 2}

# `some`: components of the global adapter, drawn at random, are trained themselves; see docs/CARRY.md.
WAYS: dict[str, Rules] = {
    "flexlora": Rules("flexlora"),
    "innovation": Rules("innovation"),
    "carry": Rules("carry", wide=FRESH_ROWS),
    "carry some": Rules("carry", fresh="some", wide=FRESH_ROWS),
    "hetlora": Rules("hetlora"),
    "flora": Rules("flora", wide=FRESH_ROWS),
    "fedit": Rules("fedit"),
}


def applies(way: str, mix: str) -> bool:
    """Whether the rule is meant for that federation: plain averaging needs one rank."""
    return way != "fedit" or len(set(MIXES[mix])) == 1


def splits(rule: str, ranks: Sequence[int]) -> list[Split]:
    """What each device trains and carries: all of the global adapter in int8 where the rule carries."""
    if not rule_named(rule).carries:
        return [Split(rank) for rank in ranks]
    carried = WIDTH if rule == "flora" else RANK_CAP
    return [Split(rank, carried, "int8") for rank in ranks]


def error(way: str, mix: str, mode: str, seed: int, versions: int) -> float:
    """Relative error of the global matrix; infinite if it diverged."""
    rules = WAYS[way]
    given = splits(rules.rule, MIXES[mix])
    return carry_toy.federate(given, rules, seed, versions, MOST_STALE[mode])


def upload_values(mix: str) -> float:
    """Values that a device sends in an update, in the mean: the same for every rule."""
    return fmean(rank * 2 * WIDTH for rank in MIXES[mix])


def measure(
    ways: Sequence[str],
    mixes: Sequence[str],
    seeds: Sequence[int],
    versions: int,
    said: Callable[[Row], None],
) -> list[Row]:
    """A row for each way, mix and mode, with the error of every seed; `said` is told of each."""
    rows = []
    for mode in MOST_STALE:
        for mix in mixes:
            for way in (way for way in ways if applies(way, mix)):
                found = [error(way, mix, mode, seed, versions) for seed in seeds]
                row = {"mode": mode, "mix": mix, "way": way, "versions": versions, "errors": found}
                row |= {"upload_values": upload_values(mix)}
                said(row)
                rows.append(row)
    return rows


def means(rows: Sequence[Row], mode: str) -> Mapping[tuple[str, str], float]:
    """(mix, way) to the mean error over seeds."""
    return {(r["mix"], r["way"]): fmean(r["errors"]) for r in rows if r["mode"] == mode}
