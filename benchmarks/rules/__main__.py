"""The merge rules compared: on a target whose answer is known, and on real training of the embedded base.

    python -m benchmarks.rules --part toy
    python -m benchmarks.rules --part training --log runs/rules_training.jsonl --seeds 3
    python -m benchmarks.rules --quick                   # under two minutes, to see that it works

Real training takes about 100 s a federation on one core. With --log, a comparison that was stopped goes on
where it was. It needs the clients of Natural Instructions (--data FILE); `--data smart-home` takes the
demonstration's households instead, which are always there. Results and what they mean: docs/RULES.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.carry import toy as carry_toy
from benchmarks.common import command
from benchmarks.common.plotting import drawing
from benchmarks.common.results import LOG_HELP, Results
from benchmarks.rules import grid as rules_grid
from benchmarks.rules import toy as rules_toy
from benchmarks.rules import training as rules_training
from benchmarks.rules.grid import FAMILY_GRID, MAIN_GRID, Grid, cases, tuning_cases
from benchmarks.rules.plots import plot_toy, plot_training
from benchmarks.rules.report import differences_table, losses_table, toy_table
from edge_sdk.core.errors import EdgeError
from edge_sdk.machine.processor import cpu_name

Row = dict[str, Any]

DATA = Path("../shared/data/natural_instructions/clients.jsonl.xz")
SMART_HOME = "smart-home"
TUNED = (2e-3, 5e-3)  # the rates that were compared before
QUICK_VERSIONS = 30


def toy(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure, print and draw the synthetic part."""
    seeds = range(1 if options.quick else options.seeds)
    versions = QUICK_VERSIONS if options.quick else carry_toy.VERSIONS

    def say(row: Row) -> None:
        errors = ", ".join(f"{error:.3f}" for error in row["errors"])
        console.print(f"{row['mode']}, {row['mix']}, {row['way']}: {errors}", highlight=False)

    rows = rules_toy.measure(list(rules_toy.WAYS), list(rules_toy.MIXES), seeds, versions, say)
    for mode in rules_toy.MOST_STALE:
        console.print(toy_table(rows, mode))
    if options.plots:
        plot_toy(rows, options.plots / "rules_toy.png")
    return rows


def training(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure, print and draw real training."""
    data = None if options.quick or options.data == SMART_HOME else Path(options.data)
    results = Results(options.log, "rules", rules_training.SETTINGS)
    grid = Grid(data, results, lambda text: console.print(text, highlight=False))
    if options.tune:
        tuned = grid.run(tuning_cases(rules_grid.MAIN, TUNED))
        for rate in TUNED:
            console.print(f"rate {rate:g}")
            console.print(losses_table([row for row in tuned if row["rate"] == rate]))
        return tuned
    if options.quick:
        ways = {"uniform": (rules_grid.FLEXLORA, rules_grid.MAIN[2])}
        rows = grid.run(cases(grid.name, ways, [0], rules_grid.QUICK_MARKS))
    else:
        seeds = range(options.seeds)
        rows = grid.run(cases(grid.name, MAIN_GRID, seeds))
        rows += grid.run(cases(grid.name, FAMILY_GRID, seeds))
    console.print(losses_table(rows))
    console.print(differences_table(rows))
    if options.plots:
        plot_training(rows, options.plots / "rules_training.png")
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser("rules", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few versions, smart-home; no result")
    parser.add_argument("--part", choices=("toy", "training"), help="only this part")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--data", default=str(DATA), help=f"clients.jsonl.xz, or {SMART_HOME}")
    parser.add_argument("--tune", action="store_true", help="compare rates, on clients kept for that")
    parser.add_argument("--log", type=Path, help=LOG_HELP)
    parser.add_argument("--plots", type=drawing, help="a folder for rules_toy.png and rules_training.png")
    parser.add_argument("--json", type=Path, help="all rows, and the machine")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for: 0, or 2 on bad input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = parse(arguments)
    torch.set_num_threads(1)
    console = command.console(200)
    result: dict[str, Any] = {"machine": {"cpu": cpu_name(), "threads": 1}}
    console.print(f"{cpu_name()}, one compute thread", highlight=False)
    try:
        if options.part != "training":
            result["toy"] = toy(options, console)
        if options.part != "toy":
            result["training"] = training(options, console)
    except EdgeError as error:
        print(f"rules: {error}", file=sys.stderr)
        return 2
    command.write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
