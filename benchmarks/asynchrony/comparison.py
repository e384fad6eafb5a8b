"""Buffered against synchronous federations: time to a fixed held-out loss, with unlike devices and drop-outs.

    python -m benchmarks.async_vs_sync --quick                        # under three minutes; no result
    python -m benchmarks.async_vs_sync --log runs/async.jsonl --json runs/async.json --plots docs
    python -m benchmarks.async_vs_sync --tune --log runs/async.jsonl  # what the policies were chosen from
    python -m benchmarks.async_vs_sync --times                        # no learning: other deadlines, a minute

Time is virtual: what devices, links and drop-outs cost is drawn (benchmarks/asynchrony/devices.py). The
engine, the trainer, the aggregation, the base and the text are the real ones. A federation takes one to two
minutes on one core; with --log, a grid that was stopped goes on where it was. It needs the clients of Natural
Instructions (--data FILE). Results and what they mean: docs/PERFORMANCE.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.asynchrony.grid import SETTINGS, Grid, cases
from benchmarks.asynchrony.plots import plot
from benchmarks.asynchrony.policies import (
    TUNING_SEEDS,
    K,
    Ways,
    candidates,
    compared,
    sweep_of_k,
    sweep_of_slots,
    sweep_of_staleness,
)
from benchmarks.asynchrony.report import Goal, as_json, summary_table, targets_table, verdict
from benchmarks.asynchrony.times import table as times_table
from benchmarks.common import command
from benchmarks.common.plotting import drawing
from benchmarks.common.results import LOG_HELP, Results
from edge_sdk.core.errors import EdgeError
from edge_sdk.machine.processor import cpu_name

Row = dict[str, Any]

DATA = Path("../shared/data/natural_instructions/clients.jsonl.xz")
GOAL = Goal(loss_share=0.75, updates=96)
TARGETS = (0.80, 0.78, 0.75, 0.73, 0.71)  # shares of the base's loss; GOAL's is the one that was fixed first
QUICK_GOAL, QUICK_SEEDS, QUICK_K = Goal(loss_share=0.8, updates=24), 1, 4
SWEEPS: Mapping[str, Callable[[], Ways]] = {
    "K": sweep_of_k,
    "slots": sweep_of_slots,
    "staleness function": sweep_of_staleness,
}


class Comparison:
    """What the command line asks for, measured.

    Args:
        grid: runs what is not known yet.
        goal: what is to be reached.
        seeds: of the main comparison.
        k: updates of a buffer and of a round.
    """

    def __init__(self, grid: Grid, goal: Goal, seeds: int, k: int = K) -> None:
        self._grid, self._goal, self._seeds, self._k = grid, goal, seeds, k

    def main(self) -> list[Row]:
        """The policies, all seeds."""
        return self._run(compared(self._k), range(self._seeds))

    def tuning(self) -> list[Row]:
        """The candidates, on seeds whose clients nothing else uses."""
        return self._run(candidates(), TUNING_SEEDS)

    def sweeps(self, seeds: int) -> dict[str, dict[str, list[Row]]]:
        """Title -> value -> rows: each of SWEEPS, the first few seeds."""
        found: dict[str, dict[str, list[Row]]] = {}
        if not seeds:
            return found
        for title, sweep in SWEEPS.items():
            values = sweep()
            rows = self._run(values, range(seeds))
            found[title] = {name: [row for row in rows if row["policy"] == name] for name in values}
        return found

    def _run(self, ways: Ways, seeds: Sequence[int]) -> list[Row]:
        return self._grid.run(cases(self._grid.name, ways, seeds, self._goal))


def measured(options: argparse.Namespace, say: Callable[[str], None]) -> Row:
    """Run what is asked for; `goal`, `rows` and `sweeps`."""
    results = Results(options.log, "async_vs_sync", SETTINGS)
    if options.quick:
        say(
            f"--quick: smart-home commands, {QUICK_SEEDS} seed, {QUICK_GOAL.updates} updates, no sweeps; "
            "to see that it works, no result"
        )
        comparison = Comparison(Grid(None, results, say), QUICK_GOAL, QUICK_SEEDS, QUICK_K)
        return {"goal": QUICK_GOAL, "rows": comparison.main(), "sweeps": {}}
    comparison = Comparison(Grid(options.data, results, say), GOAL, options.seeds)
    if options.tune:
        return {"goal": GOAL, "rows": comparison.tuning(), "sweeps": {}}
    rows = comparison.main()
    return {"goal": GOAL, "rows": rows, "sweeps": comparison.sweeps(options.sweep_seeds)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.parser("async_vs_sync", __doc__)
    parser.add_argument("--quick", action="store_true", help="smart-home, one seed, half of it; no result")
    parser.add_argument("--seeds", type=int, default=5, help="of the comparison (default %(default)s)")
    parser.add_argument(
        "--sweep-seeds", type=int, default=3, help="of each K and function (default %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="clients.jsonl.xz of Natural Instructions")
    parser.add_argument("--tune", action="store_true", help="compare candidates, on clients kept for that")
    parser.add_argument("--times", action="store_true", help="no learning: when updates come, by deadline")
    parser.add_argument("--log", type=Path, help=LOG_HELP)
    parser.add_argument("--plots", type=drawing, help="a folder for async_vs_sync.png")
    parser.add_argument("--json", type=Path, help="all rows, and the speed-up")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for: 0, or 2 on bad input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = parse(arguments)
    torch.set_num_threads(1)
    console = command.console(220)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    say(f"{cpu_name()}, one compute thread; hours are virtual")
    if options.times:
        console.print(times_table(range(options.seeds), GOAL.updates))
        return 0
    try:
        found = measured(options, say)
    except EdgeError as error:
        print(f"async_vs_sync: {error}", file=sys.stderr)
        return 2
    goal, rows, sweeps = found["goal"], found["rows"], found["sweeps"]
    console.print(summary_table(rows, goal))
    for title, values in sweeps.items():
        console.print(summary_table([row for found in values.values() for row in found], goal, title))
    if not options.tune:
        console.print(targets_table(rows, goal, TARGETS))
        say(verdict(rows, goal))
        if options.plots:
            plot(rows, sweeps, goal, options.plots / "async_vs_sync.png")
    if options.json:
        written = {"machine": {"cpu": cpu_name(), "threads": 1}, "quick": options.quick}
        written |= as_json(rows, goal) | {
            "sweeps": {
                title: {value: as_json(of, goal)["rows"] for value, of in values.items()}
                for title, values in sweeps.items()
            }
        }
        command.write_json(options.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
