"""What a device's memory is best spent on under the rule `carry`: rank to train, or components to carry.

    python -m benchmarks.carry_trade --quick             # a few minutes
    python -m benchmarks.carry_trade --log FILE          # over an hour; goes on where it was stopped

All lines of a table of equal memory have that of R trained ranks, at 16 bytes a value (weight, gradient, two
moments of Adam in float32). `flexlora` and "all trained" spend it on r = R; the others train less and hold c
components of the global adapter frozen, in some dtype. Two parts: a synthetic target whose answer is known
(benchmarks/carry/toy.py), and the embedded base on smart-home commands (benchmarks/carry/training.py).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.carry import toy as carry_toy
from benchmarks.carry import training as carry_training
from benchmarks.carry.toy import DEVICES, Rules, Split
from benchmarks.carry.training import Choice, Federation
from benchmarks.common import command
from benchmarks.common.federation import RANK_CAP
from benchmarks.common.results import LOG_HELP, Results, opened, spread
from edge_sdk.core.choice.carried import BYTES_PER_VALUE, CarriedDtype
from edge_sdk.core.choice.memory import FACTOR_BYTES, MOMENT_BYTES
from edge_sdk.machine.processor import cpu_name

TRAINED_BYTES = 2 * FACTOR_BYTES + MOMENT_BYTES["adamw"]  # per value: weight, gradient, two moments
WIDE = 4.0  # of the random rows of A under `carry`; the table of starts says why

# 80 % of the devices have the memory of rank 2, the others of 4, 8 and 16.
HEAVY_TAIL_LIGHT = [2] * 64 + [4] * 6 + [8] * 5 + [16] * 5
FEDERATIONS = {
    "all 2": [2] * DEVICES,
    "all 4": [4] * DEVICES,
    "all 8": [8] * DEVICES,
    "heavy-tail-light": HEAVY_TAIL_LIGHT,
}


def carried_for(budget: int, rank: int, dtype: CarriedDtype) -> int:
    """Components that fit in `dtype` beside a trained rank, in the memory of `budget` trained ones."""
    return min(RANK_CAP, int(TRAINED_BYTES * (budget - rank) / BYTES_PER_VALUE[dtype]))


def _half(budget: int, dtype: CarriedDtype) -> Split:
    rank = max(1, budget // 2)
    return Split(rank, carried_for(budget, rank, dtype), dtype)


def _all_first(budget: int, dtype: CarriedDtype) -> Split:
    """The largest rank beside which all of G (but for two components) is carried, else the lowest rank."""
    for rank in range(budget - 1, 0, -1):
        if carried_for(budget, rank, dtype) >= RANK_CAP - 2:
            return Split(rank, carried_for(budget, rank, dtype), dtype)
    return Split(1, carried_for(budget, 1, dtype), dtype)


LINES: dict[str, tuple[str, Callable[[int], Split]]] = {
    "flexlora, all trained": ("flexlora", Split),
    "carry, all trained": ("carry", Split),
    "carry, half in 32 bits": ("carry", lambda budget: _half(budget, "float32")),
    "carry, half in 16 bits": ("carry", lambda budget: _half(budget, "bfloat16")),
    "carry, all of G in 16 bits": ("carry", lambda budget: _all_first(budget, "bfloat16")),
    "carry, all of G in int8": ("carry", lambda budget: _all_first(budget, "int8")),
    "carry, all of G in NF4": ("carry", lambda budget: _all_first(budget, "nf4")),
}

STARTS = {
    "random A": Rules(),
    "random A × 4": Rules(wide=4.0),
    "A = first rows of G": Rules(fresh="top"),
    "first components of G themselves": Rules(fresh="warm"),
    "random components of G themselves": Rules(fresh="some"),
}

# Households of the federations on real training, by the memory of so many trained ranks.
MEMORIES = {"all 4": [4] * 6, "mixed": [2, 2, 2, 4, 8, 16]}


def _flexlora(budget: int) -> Choice:
    return Choice("flexlora", budget)


def _int8(budget: int) -> Choice:
    rank = max(1, budget - 2)
    return Choice("carry", rank, min(30, carried_for(budget, rank, "int8")), "int8", wide=WIDE)


def _nf4(budget: int) -> Choice:
    return Choice("carry", budget - 1, 28, "nf4", wide=WIDE)


def _nf4_some(budget: int) -> Choice:
    """The trained components are carried ones, so that the memory holds as many more."""
    return Choice("carry", budget - 1, min(RANK_CAP, 27 + budget), "nf4", "some", rate=2.0)


def _int8_some(budget: int) -> Choice:
    if budget == 2:
        return Choice("carry", 1, 16, "int8", "some", rate=2.0)
    return Choice("carry", budget - 2, min(RANK_CAP, 28 + budget), "int8", "some", rate=2.0)


TRAINING_LINES: dict[str, Callable[[int], Choice]] = {
    "flexlora, all trained": _flexlora,
    "carry, all of G in int8": _int8,
    "carry, all of G in NF4": _nf4,
    "some trained, rest in int8": _int8_some,
    "some trained, rest in NF4": _nf4_some,
}

# How factors begin: r = 4 for all, memory not equal.
TRAINING_STARTS = [
    Choice("flexlora", 4),
    Choice("flexlora", 4, rate=2.0),
    Choice("carry", 4, 32, "int8"),
    Choice("carry", 4, 32, "int8", rate=2.0),
    Choice("carry", 4, 32, "int8", wide=WIDE),
    Choice("carry", 4, 32, "int8", "top"),
    Choice("carry", 4, 32, "int8", "warm"),
    Choice("carry", 4, 32, "int8", "some"),
    Choice("carry", 4, 32, "int8", "some", rate=2.0),
]


def toy(results: Results, seeds: Sequence[int], versions: int, console: Console) -> list[Table]:
    """Both synthetic tables: equal memory, and starts."""

    def error(splits: list[Split], rules: Rules, line: str) -> str:
        found = []
        for seed in seeds:
            case = {"part": "toy", "versions": versions, "line": line, "seed": seed}
            found.append(results.get(case, partial(carry_toy.federate, splits, rules, seed, versions)))
        return spread(found)

    lines = Table(title="Synthetic target, equal memory: relative error of G", title_justify="left")
    starts = Table(title="Synthetic target, all of G carried: how factors begin", title_justify="left")
    for table, first in ((lines, "memory spent on"), (starts, "factors begin as")):
        table.add_column(first)
        for name in FEDERATIONS:
            table.add_column(name, justify="right")
    for name, (rule, line) in track(LINES.items(), "lines", console=console, transient=True):
        rules = Rules("flexlora") if rule == "flexlora" else Rules(wide=WIDE)
        lines.add_row(
            name, *(error([line(b) for b in bs], rules, f"{name}/{fed}") for fed, bs in FEDERATIONS.items())
        )
    for name, rules in track(STARTS.items(), "starts", console=console, transient=True):
        cells = [
            error([Split(b, RANK_CAP) for b in bs], rules, f"{name}/{fed}") for fed, bs in FEDERATIONS.items()
        ]
        starts.add_row(name, *cells)
    return [lines, starts, _carried_table(error)]


def _carried_table(error: Callable[[list[Split], Rules, str], str]) -> Table:
    """How much of G: r = 2 for all, memory not equal; all devices carry so little, or one in five does."""
    table = Table(title="Synthetic target, all train r = 2: how much is carried", title_justify="left")
    for column in ("c", "dtype", "all, corrected", "all, not", "one in five, corrected", "one in five, not"):
        table.add_column(column, justify="right")
    others = [Split(2, RANK_CAP, "int8")] * (DEVICES - DEVICES // 5)
    parts = [(0, "float32"), (4, "float32"), (8, "float32"), (16, "float32"), (24, "float32")]
    for carry_rank, dtype in (*parts, *((RANK_CAP, dtype) for dtype in BYTES_PER_VALUE)):
        split = Split(2, carry_rank, dtype)  # type: ignore[arg-type]
        groups = {"all": [split] * DEVICES, "fifth": [*others, *([split] * (DEVICES // 5))]}
        cells = [
            error(splits, Rules(wide=WIDE, corrected=corrected), f"c={carry_rank} {dtype} {who}/{corrected}")
            for who, splits in groups.items()
            for corrected in (True, False)
        ]
        table.add_row(str(carry_rank), dtype, *cells)
    return table


def training(
    results: Results, seeds: Sequence[int], versions: int, federations: dict[str, list[Choice]]
) -> Table:
    """Held-out loss on the embedded base after each third of `versions`; a federation is a choice each."""
    loaded = cache(Federation)  # not at all where every row is known

    def run(choices: list[Choice], seed: int) -> Any:
        return vars(loaded().run(choices, seed, versions, versions // 3))

    marks = [str(versions * part // 3) for part in (1, 2, 3)]
    table = Table(title="Embedded base, smart-home commands: held-out loss", title_justify="left")
    for column in ("devices", "seeds", *(f"version {m}" for m in marks), "ms a step"):
        table.add_column(column, justify="left" if column == "devices" else "right")
    rows: dict[str, list[Any]] = {name: [] for name in federations}
    for seed in seeds:  # seeds outside, so that a run that is stopped leaves whole comparisons
        for name, choices in federations.items():
            case = {"part": "training", "versions": versions, "line": name, "seed": seed}
            rows[name].append(results.get(case, partial(run, choices, seed)))
    for name, found in rows.items():
        cells = [spread([row["losses"][mark] for row in found]) for mark in marks]
        step = statistics.median(row["step_s"] for row in found)
        table.add_row(name, str(len(found)), *cells, f"{1000 * step:.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, and print the tables."""
    parser = command.parser("carry_trade", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few versions; noise, not a result")
    parser.add_argument("--part", choices=("toy", "training"), help="only this part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log", "--json", type=Path, help=LOG_HELP)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console()
    settings = {"toy": carry_toy.SETTINGS, "training": carry_training.SETTINGS}
    results = opened(parser, options.log, "carry_trade", settings)
    seeds = range(1 if options.quick else options.seeds)
    console.print(f"{cpu_name()}, one thread")
    if options.part != "training":
        for table in toy(results, seeds, 30 if options.quick else carry_toy.VERSIONS, console):
            console.print(table)
    if options.part != "toy":
        versions = 3 if options.quick else 12
        equal = {
            f"{group}: {line}": [make(budget) for budget in budgets]
            for group, budgets in MEMORIES.items()
            for line, make in TRAINING_LINES.items()
            if not options.quick or (group == "mixed" and make in (_flexlora, _nf4))
        }
        console.print(training(results, seeds, versions, equal))
        if not options.quick:
            console.print(training(results, seeds, versions, {c.name: [c] * 6 for c in TRAINING_STARTS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
