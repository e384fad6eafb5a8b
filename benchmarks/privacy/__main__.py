"""What differential privacy costs in held-out loss: real training on the embedded base, clipped and noised.

    python -m benchmarks.privacy --quick                     # a few minutes, to see that it works
    python -m benchmarks.privacy --log runs/privacy.jsonl    # half an hour on a free core; goes on if stopped

12 smart-home households (examples/smart_home.py) under the rule `carry`, everything carried; each version
merges K = 8 of them, half from the version before, with weights s(τ)/K. How noise compares with signal is
set by z/K, so that one line is read for other K too: the same noise with K' devices in a version has z' =
z·K'/K, and an ε of its own. That is arithmetic about the noise; a federation of so many devices was not
run. The noise comes from a seed here, so that a run can be repeated; the coordinator's never does.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import command
from benchmarks.common.results import LOG_HELP, opened
from benchmarks.privacy.training import BUFFER_SIZE, SETTINGS, Federation, Outcome
from coordinator.privacy.accountant import epsilon
from edge_sdk.machine.processor import cpu_name

VERSIONS = 6
DELTA = 1e-5
OTHER_SIZES = (100, 1000, 10_000)

# (C, z): not clipped; clipped only; and noise from little to what K = 8 needs for an ε below 10.
LINES: tuple[tuple[float, float], ...] = (
    (math.inf, 0.0),
    (10.0, 0.0),
    (10.0, 0.01),
    (10.0, 0.03),
    (10.0, 0.1),
    (10.0, 2.0),
)


def table_of(rows: Mapping[tuple[float, float], Sequence[Outcome]]) -> Table:
    """Held-out loss and ε of each line; ε for larger K is that of the same noise."""
    table = Table(title=f"Held-out loss; worst device's ε at δ = {DELTA:g}", title_justify="left")
    table.add_column("C")
    sizes = (BUFFER_SIZE, *OTHER_SIZES)
    for column in ("z", "z·C/K", "loss", *(f"ε, K={k}" for k in sizes)):
        table.add_column(column, justify="right", no_wrap=True)
    for (clip_norm, z), found in rows.items():
        losses = [outcome.losses[-1] for outcome in found]
        low_high = f" ({min(losses):.2f} to {max(losses):.2f})" if len(losses) > 1 else ""
        most = max(outcome.most_entered for outcome in found)
        costs = [f"{epsilon({z * k / BUFFER_SIZE: most}, DELTA):.3g}" if z else "∞" for k in sizes]
        table.add_row(
            "∞" if clip_norm == math.inf else f"{clip_norm:g}",
            f"{z:g}",
            f"{z * clip_norm / BUFFER_SIZE:.4f}" if z else "0",
            f"{statistics.mean(losses):.3f}{low_high}",
            *costs,
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, and print the table."""
    parser = command.parser("privacy", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two versions, three lines: no result")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--log", "--json", type=Path, help=LOG_HELP)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = command.console(150)
    results = opened(parser, options.log, "privacy", SETTINGS)
    versions = 2 if options.quick else VERSIONS
    lines = [LINES[0], LINES[4], LINES[-1]] if options.quick else LINES
    federation = functools.cache(Federation)  # not at all where every row is known

    def run(line: tuple[float, float], seed: int) -> dict[str, Any]:
        return vars(federation().run(*line, seed, versions))

    rows: dict[tuple[float, float], list[Outcome]] = {line: [] for line in lines}
    console.print(f"{cpu_name()}, one thread; {versions} versions of {BUFFER_SIZE} updates")
    for seed in range(1 if options.quick else options.seeds):  # a stopped run leaves whole comparisons
        for line in lines:
            case = {"versions": versions, "C": f"{line[0]:g}", "z": f"{line[1]:g}", "seed": seed}
            found = results.get(case, functools.partial(run, line, seed))
            rows[line].append(Outcome(**found))
            console.print(f"C={case['C']} z={case['z']}, seed {seed}: {rows[line][-1]}")
    console.print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
