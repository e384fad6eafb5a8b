"""What poisoned updates do to a federation, and what each defence keeps of it.

    python -m benchmarks.poisoning --quick             # a few minutes; noise, not a result
    python -m benchmarks.poisoning --log FILE          # an hour a seed; goes on where it was stopped

A fifth of the devices is hostile: `flipped` sends −D in place of what it learnt, D; `reversed` −10·D;
`scaled` 100·D. "without them" is the federation in which they hand in nothing: what a perfect defence would
give. Two parts: a target whose answer is known (benchmarks/poisoning/toy.py), and the embedded base on
smart-home commands (benchmarks/poisoning/training.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import command
from benchmarks.common.results import LOG_HELP, Results, opened, spread
from benchmarks.poisoning import toy as poisoning_toy
from benchmarks.poisoning import training as poisoning_training
from benchmarks.poisoning.toy import Attack, Case, Defence
from benchmarks.poisoning.training import HONEST_VERSIONS, Federation
from edge_sdk.machine.processor import cpu_name

ATTACKS: tuple[Attack, ...] = ("scaled", "reversed", "flipped", "nobody")
DEFENCES: dict[Defence, str] = {
    "none": "none",
    "bound": "the learnt bound, clipped",
    "norm_median": "norm-median clipping",
    "geometric_median": "geometric median",
    "trimmed": "trimmed by norm",
}
TOY_RULES: tuple[str, ...] = ("carry", "innovation", "flexlora")
TRAINING_RULES: tuple[str, ...] = ("carry", "flexlora")


def cases(rule: str, quick: bool) -> list[Case]:
    """All of a rule's table, the plainest first."""
    defences: list[Defence] = ["none", "geometric_median"] if quick else list(DEFENCES)
    attacks: Sequence[Attack] = ("reversed",) if quick else ATTACKS
    return [
        Case(rule, "absent", "none"),
        *(Case(rule, attack, defence) for attack in attacks for defence in defences),
    ]


def table(title: str, rule: str, found: Callable[[Case], list[float]]) -> Table:
    """What each attack (columns) does under each defence; a dash for what was not run."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("defence")
    for attack in ATTACKS:
        shown.add_column(attack, justify="right")

    def cell(case: Case) -> str:
        values = found(case)
        return spread(values) if values else "–"

    for defence, name in DEFENCES.items():
        shown.add_row(name, *(cell(Case(rule, attack, defence)) for attack in ATTACKS))
    shown.add_row("without them", cell(Case(rule, "absent", "none")))
    return shown


def toy(results: Results, seeds: Sequence[int], rules: Sequence[str], quick: bool) -> list[Table]:
    """Relative errors on the known target."""

    def key(case: Case, seed: int) -> dict[str, Any]:
        return {"part": "toy", **asdict(case), "seed": seed}

    for case in [case for rule in rules for case in cases(rule, quick)]:
        for seed in seeds:
            results.get(key(case, seed), partial(poisoning_toy.federate, case, seed))

    def found(case: Case) -> list[float]:
        errors = [results.find(key(case, seed)) for seed in seeds]
        return [error for error in errors if error is not None]

    return [table(f"Known target, rule {rule}: relative error", rule, found) for rule in rules]


def training(
    results: Results, seeds: Sequence[int], rules: Sequence[str], versions: int, quick: bool
) -> list[Table]:
    """Held-out losses of the embedded base after `versions` versions."""

    def key(case: Case, seed: int) -> dict[str, Any]:
        return {"part": "training", "versions": versions, **asdict(case), "seed": seed}

    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        for seed in seeds:  # seeds outside, so that a run that is stopped leaves whole comparisons
            for case in [case for rule in rules for case in cases(rule, quick)]:
                losses = results.get(key(case, seed), partial(federation.run, case, seed, versions))
                name = f"{case.rule}/{case.attack}/{case.defence}/{seed}"
                print(name, f"{losses[str(versions)]:.3f}", flush=True)

    def found(case: Case) -> list[float]:
        rows = [results.find(key(case, seed)) for seed in seeds]
        return [row[str(versions)] for row in rows if row]

    return [table(f"Embedded base, rule {r}: held-out loss, version {versions}", r, found) for r in rules]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, and print the tables."""
    parser = command.parser("poisoning", __doc__)
    parser.add_argument("--quick", action="store_true", help="one rule, one seed and few versions")
    parser.add_argument("--part", choices=("toy", "training"), help="only this part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--versions", type=int, default=12, help="of the training (default %(default)s)")
    parser.add_argument("--log", "--json", type=Path, help=LOG_HELP)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = command.console(150)
    quick = options.quick
    settings = {"toy": poisoning_toy.SETTINGS, "training": poisoning_training.SETTINGS}
    results = opened(parser, options.log, "poisoning", settings)
    seeds = range(1 if quick else options.seeds)
    console.print(f"{cpu_name()}, one thread")
    if options.part != "training":
        for shown in toy(results, seeds, TOY_RULES[: 1 if quick else None], quick):
            console.print(shown)
    if options.part != "toy":
        versions = HONEST_VERSIONS + 1 if quick else options.versions
        rules = TRAINING_RULES[: 1 if quick else None]
        for shown in training(results, seeds, rules, versions, quick):
            console.print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
