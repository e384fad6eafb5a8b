"""What differential privacy costs in held-out loss: real training on the embedded base, clipped and noised.

    python -m benchmarks.privacy --quick                     # a few minutes, to see that it works
    python -m benchmarks.privacy --json runs/privacy.json    # half an hour on a free core; goes on if stopped

12 smart-home households (examples/smart_home.py) under the rule `carry`, everything carried; each version
merges K = 8 of them, half from the version before, with weights s(τ)/K. How noise compares with signal is
set by z/K, so that one line is read for other K too: the same noise with K' devices in a version has z' =
z·K'/K, and an ε of its own. That is arithmetic about the noise; a federation of so many devices was not
run. The noise comes from a seed here, so that a run can be repeated; the coordinator's never does.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.common import command
from coordinator.engine import weights
from coordinator.privacy.accountant import epsilon
from coordinator.privacy.mechanism import Privacy, clip_factor, noised, squared_norm_bound
from edge_sdk.core.flexlora import live_rank, pad, split
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Training
from edge_sdk.machine.processor import cpu_name
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, Start
from edge_sdk.training.trainer import Trainer
from examples import smart_home

SCALING, RANK, RANK_CAP = 2.0, 4, 32
WIDE = 4.0  # rows of a fresh A under `carry`, as the device draws them
HOUSEHOLDS, BUFFER_SIZE = 12, 8
TRAINING = Training(steps=6, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.94)
VERSIONS, TEST_PER_INTENT = 6, 3
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


@dataclass(frozen=True)
class Outcome:
    """Held-out loss at half and at the end, norms of changes, versions that the busiest device entered."""

    losses: list[float]
    median_norm: float
    clipped_share: float
    most_entered: int


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        self._shapes = base_model.describe("tiny").modules
        self._trainer = Trainer(base_model.load("tiny", device="cpu"), self._shapes, SCALING, progress=False)

    def run(self, clip_norm: float, z: float, seed: int, versions: int) -> Outcome:
        """Train `versions` versions; clip to `clip_norm` (∞: not) and add noise of multiplier `z`."""
        homes = smart_home.households(HOUSEHOLDS, seed)
        data = [self._rows(home.train) for home in homes]
        held_out = self._rows(smart_home.test_set(smart_home.INTENTS, TEST_PER_INTENT, seed))
        empty = {name: LoraFactors.empty(*shape) for name, shape in self._shapes.items()}
        history: list[Adapter] = [empty]
        losses, norms, entered = [], [], Counter[int]()
        for version in range(versions):
            drawn = np.random.default_rng([seed, version])
            addends = []
            for place, home in enumerate(drawn.permutation(HOUSEHOLDS)[:BUFFER_SIZE]):
                begin = max(0, version - place % 2)
                change = self._train(history[begin], data[home], begin, seed * 10_000 + version * 100 + home)
                squared = sum(squared_norm_bound(f) for f in change.values())
                norms.append(math.sqrt(squared))
                factor = clip_factor(squared, clip_norm) if clip_norm < math.inf else 1.0
                addends.append((factor * weights.polynomial(version - begin) / BUFFER_SIZE, change))
                entered[int(home)] += 1
            std = Privacy(z, clip_norm).noise_std(BUFFER_SIZE) if z else 0.0
            history.append(self._merged(history[-1], addends, std, np.random.default_rng([seed, version, 1])))
            if version in (versions // 2 - 1, versions - 1):
                losses.append(self._trainer.evaluate(history[-1], held_out).loss)
        clipped = statistics.mean(norm > clip_norm for norm in norms)
        return Outcome(losses, statistics.median(norms), clipped, max(entered.values()))

    def _rows(self, records: Sequence[Mapping[str, str]]) -> list[Tokenised]:
        tokenizer = self._trainer.base.tokenizer
        return [tokenise(parse_record(dict(r)), tokenizer, TRAINING.sequence_len) for r in records]

    def _train(self, current: Adapter, rows: list[Tokenised], version: int, seed: int) -> Adapter:
        """One assignment: fresh factors on top of all live components of a version."""
        carried = {name: split(f.leading(live_rank(f)), "balanced") for name, f in current.items()}
        fresh = {}
        for name, shape in self._shapes.items():
            drawn = pad(LoraFactors.empty(*shape), min(RANK, *shape), f"{seed}/{name}")
            fresh[name] = LoraFactors(drawn.b, drawn.a * np.float32(WIDE))
        rate = TRAINING.learning_rate_at(version)
        plan = Plan(TRAINING.steps, TRAINING.batch, TRAINING.batch, TRAINING.sequence_len, rate)
        start = Start(fresh, carried, RANK, int(seed))
        return self._trainer.train(start, rows, plan, on_step=lambda _: "continue").adapter

    def _merged(
        self, current: Adapter, changes: list[tuple[float, Adapter]], std: float, draw: np.random.Generator
    ) -> dict[str, LoraFactors]:
        """The next version, by the coordinator's own noised merge."""
        merged = {}
        for name, shape in self._shapes.items():
            addends = [(1.0, current[name]), *((weight, change[name]) for weight, change in changes)]
            merged[name] = noised(addends, std, min(RANK_CAP, *shape), draw.standard_normal).factors
        return merged


class Results:
    """Rows by key, written after each, so that a stopped run loses at most one."""

    def __init__(self, path: Path | None) -> None:
        cpu = cpu_name()
        self.machine = {"cpu": cpu, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
        self._path = path
        self._rows: dict[str, Any] = {}
        if path and path.exists():
            self._rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def get(self, key: str, make: Callable[[], Outcome]) -> Outcome:
        """The outcome of this key, measured now if it is not there yet."""
        if key not in self._rows:
            self._rows[key] = vars(make())
            if self._path:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"machine": self.machine, "rows": self._rows}, indent=1)
                self._path.write_text(text + "\n", encoding="utf-8")
        return Outcome(**self._rows[key])


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
    """Measure, print the table, and write JSON if asked."""
    parser = command.parser("privacy", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, two versions, three lines: no result")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = command.console(150)
    results = Results(options.json)
    versions = 2 if options.quick else VERSIONS
    lines = [LINES[0], LINES[4], LINES[-1]] if options.quick else LINES
    federation = Federation()
    rows: dict[tuple[float, float], list[Outcome]] = {line: [] for line in lines}
    console.print(f"{results.machine['cpu']}, one thread; {versions} versions of {BUFFER_SIZE} updates")
    for seed in range(1 if options.quick else options.seeds):  # a stopped run leaves whole comparisons
        for line in lines:
            key = f"{versions}/C={line[0]:g} z={line[1]:g}/{seed}"
            rows[line].append(results.get(key, partial(federation.run, *line, seed, versions)))
            console.print(f"{key}: {rows[line][-1]}")
    console.print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
