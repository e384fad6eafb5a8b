"""Which federations are compared on real training.

Seeds are the outer loop, so that the log of a grid that is not yet done holds whole comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.clients import TUNING_SEED, NaturalInstructions, SmartHome, check_there
from benchmarks.common.results import Results
from benchmarks.rules.training import Federation, Way

Row = dict[str, Any]

MARKS = (4, 8, 12)  # versions after which losses are measured
QUICK_MARKS = (1, 2)

# Ranks of 20 devices (the first few, or over again): the shares of the FlexLoRA paper's types.
MIXES: dict[str, tuple[int, ...]] = {
    "all 2": (2,) * 20,
    "heavy-tail-light": (2, 2, 4, 2, 2, 2, 8, 2, 2, 2, 16, 2, 2, 4, 2, 2, 2, 2, 2, 2),
    "uniform": (2, 4, 8, 16) * 5,
    "all 4": (4,) * 20,
    "all 16": (16,) * 20,
}


# Of 2e-3 and 5e-3, every way was better at 2e-3 in the mean over the groups of clients; docs/RULES.md.
RATE = 2e-3
FLEXLORA = Way("flexlora", "given", RATE)
MAIN = (FLEXLORA, Way("innovation", "given", RATE), Way("carry", "fresh", RATE), Way("carry", "some", RATE))
FEDIT, HETLORA = Way("fedit", "given", RATE), Way("hetlora", "given", RATE)
FLORA = Way("flora", "fresh", RATE)
SPARSE = Way("flexlora", "sparse", RATE)

# The three rules. Rank 4 for all is what the memory of `carry` with rank 2 buys without carrying.
MAIN_GRID: dict[str, tuple[Way, ...]] = {
    "heavy-tail-light": MAIN,
    "all 2": MAIN,
    "all 4": (FLEXLORA,),
    "uniform": MAIN[:3],
}
FAMILY_GRID = {"heavy-tail-light": (HETLORA, FLORA, SPARSE), "all 2": (FEDIT,), "all 16": (FLEXLORA,)}


@dataclass(frozen=True)
class Case:
    """One federation of the grid."""

    data: str
    mix: str
    way: Way
    seed: int
    marks: tuple[int, ...] = MARKS

    @property
    def key(self) -> Row:
        """What tells it from all others among the results."""
        return {
            "data": self.data,
            "mix": self.mix,
            "way": self.way.name,
            "rate": self.way.rate,
            "seed": self.seed,
            "versions": self.marks[-1],
        }


def dealt(mix: str, devices: int, seed: int) -> list[int]:
    """The rank of each device: those of the mix in an order drawn by `seed`, the same for all rules."""
    shares = MIXES[mix]
    ranks = [shares[place % len(shares)] for place in range(devices)]
    return [ranks[i] for i in np.random.default_rng([seed, 7]).permutation(devices)]


class Grid:
    """Runs what is not in the log yet.

    Args:
        data: `clients.jsonl.xz` of Natural Instructions, or None for smart-home commands.
        results: what is known already, and where rows go.
        said: is told of every row.
    """

    def __init__(self, data: Path | None, results: Results, said: Callable[[str], None]) -> None:
        self.name = "natural-instructions" if data else "smart-home"
        if data:
            check_there(data)
        self._federation = Federation()
        self._source = NaturalInstructions(data, self._federation.base.tokens) if data else SmartHome()
        self._results, self._said = results, said
        self._base_losses: dict[int, dict[str, float]] = {}

    def run(self, cases: Sequence[Case]) -> list[Row]:
        """The rows of `cases`, in their order; each is measured unless the log has it."""
        return [self._row(case) for case in cases]

    def _row(self, case: Case) -> Row:
        return {**case.key, **self._results.get(case.key, lambda: self._measured(case))}

    def _measured(self, case: Case) -> Row:
        clients = self._source.clients(case.seed)
        ranks = dealt(case.mix, len(clients.participants), case.seed)
        if case.seed not in self._base_losses:
            self._base_losses[case.seed] = self._federation.losses(None, clients)
        row: Row = {"ranks": ranks, "begins": case.way.begins, "base": self._base_losses[case.seed]}
        row |= self._federation.run(case.way, ranks, clients, case.seed, case.marks)
        last = ", ".join(f"{group} {loss:.3f}" for group, loss in row["losses"][str(case.marks[-1])].items())
        self._said(f"{case.mix}, {case.way.name}, seed {case.seed}: {last} ({row['seconds']:.0f} s)")
        return row


def cases(
    data: str,
    ways: Mapping[str, Sequence[Way]],
    seeds: Sequence[int],
    marks: tuple[int, ...] = MARKS,
) -> list[Case]:
    """All of the grid: `ways` says which ways are run with which mix."""
    return [
        Case(data, mix, way, seed, marks)
        for seed in seeds
        for mix, members in ways.items()
        for way in members
    ]


def tuning_cases(ways: Sequence[Way], rates: Sequence[float], marks: tuple[int, ...] = (3, 6)) -> list[Case]:
    """Every way at every rate, on clients that no comparison uses."""
    return [
        Case("natural-instructions", "uniform", Way(way.rule, way.begins, rate), TUNING_SEED, marks)
        for rate in rates
        for way in ways
    ]
