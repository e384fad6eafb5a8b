"""What poisoned updates do to a federation, and what each defence keeps of it: real training, the real merge.

    python -m benchmarks.poisoning --quick             # two minutes; noise, not a result
    python -m benchmarks.poisoning --json FILE         # an hour or two; goes on where it was stopped

Ten smart-home households (examples/smart_home.py) of ranks 2, 4 and 8 train the embedded base; a version
merges five updates, half of them from the version before. Two households of ten are hostile from the third
version on: `flipped` sends −D in place of what it learnt, D; `reversed` −10·D; `scaled` 100·D. Updates are
files, and are measured, bounded and merged by the coordinator's own code. "without them" is the federation in
which the two hand in nothing: what a perfect defence would give.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.carry_trade import Results, spread
from coordinator.admission import Admission, admit, bound, measure
from coordinator.aggregation import Addend, Start, aggregate
from coordinator.blobs import Blobs
from coordinator.robust import RobustName
from coordinator.rules import RULES
from edge_sdk import base_model, trainer
from edge_sdk.core import messages
from edge_sdk.core.codec import encode, open_own
from edge_sdk.core.flexlora import combine, live_rank
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import RuleName, Training
from edge_sdk.dataset import Tokenised, tokenise
from edge_sdk.jsonl import parse_record
from edge_sdk.processor import cpu_name
from examples import smart_home

SCALING, RANK_CAP = 2.0, 32
RANKS = (2, 4, 8, 2, 4, 2, 4, 8, 2, 4)  # of the ten households
HOSTILE = (1, 6)
HONEST_VERSIONS = 2  # before the attack: 10 updates, so that there is a history to learn a bound from
BUFFER_SIZE = 5
TRAINING = Training(steps=16, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.96)
TEST_PER_INTENT = 6

Attack = Literal["nobody", "flipped", "reversed", "scaled", "absent"]
TIMES: Mapping[Attack, float] = {"nobody": 1.0, "flipped": -1.0, "reversed": -10.0, "scaled": 100.0}
ATTACKS: tuple[Attack, ...] = ("nobody", "flipped", "reversed", "scaled")

Defence = Literal["none", "bound", "norm_median", "geometric_median", "trimmed"]
DEFENCES: dict[Defence, str] = {
    "none": "none",
    "bound": "the learnt bound, clipped",
    "norm_median": "norm-median clipping",
    "geometric_median": "geometric median",
    "trimmed": "trimmed by norm",
}
RULE_NAMES: tuple[RuleName, ...] = ("carry", "flexlora")


@dataclass(frozen=True)
class Case:
    """A merge rule, what the hostile households send, and what is done about it."""

    rule: RuleName
    attack: Attack
    defence: Defence

    @property
    def admission(self) -> Admission:
        """The host's settings. Without the bound no update is ever long."""
        robust: RobustName = "none" if self.defence == "bound" else self.defence
        return Admission(norm_factor=5.0 if self.defence == "bound" else 1e30, robust=robust)


@dataclass
class Published:
    """The versions so far, as files, and the norms of accepted updates."""

    starts: list[Start] = field(default_factory=lambda: [Start(0)])
    norms: list[tuple[str, float]] = field(default_factory=list)

    def module(self, version: int, name: str, shape: tuple[int, int]) -> LoraFactors:
        """The stored factors of a version; empty for version 0."""
        path = self.starts[version].path
        return open_own(path, SCALING).module(name) if path else LoraFactors.empty(*shape)


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        base = base_model.load("tiny", device="cpu")
        self._base = base_model.describe("tiny")
        self._shapes = self._base.modules
        self._trainer = trainer.Trainer(base, self._shapes, SCALING, progress=False)

    def _rows(self, records: Sequence[Mapping[str, str]]) -> list[Tokenised]:
        tokenizer = self._trainer.base.tokenizer
        return [tokenise(parse_record(dict(r)), tokenizer, TRAINING.sequence_len) for r in records]

    def run(self, case: Case, seed: int, versions: int) -> dict[str, float]:
        """Train `versions` versions; held-out loss (nats a token, all intents) after each quarter."""
        homes = smart_home.households(len(RANKS), seed)
        data = [self._rows(home.train) for home in homes]
        held_out = self._rows(smart_home.test_set(smart_home.INTENTS, TEST_PER_INTENT, seed))
        federation = messages.Federation(
            "poisoned", self._base, case.rule, (2, 4, 8), RANK_CAP, SCALING, "balanced", TRAINING
        )
        published, losses = Published(), {"0": self._trainer.evaluate(None, held_out).loss}
        with tempfile.TemporaryDirectory() as folder:
            blobs = Blobs(Path(folder))
            for version in range(versions):
                addends = self._updates(case, (seed, version), data, published, blobs)
                current = published.starts[version]
                outcome = aggregate(federation, 1.0, current, addends, blobs, case.admission)
                published.starts.append(Start(version + 1, blobs.path(outcome.digest)))
                if (version + 1) % max(1, versions // 4) == 0 or version + 1 == versions:
                    newest = dict(open_own(blobs.path(outcome.digest), SCALING).modules())
                    losses[str(version + 1)] = self._trainer.evaluate(newest, held_out).loss
        return losses

    def _updates(
        self, case: Case, at: tuple[int, int], data: list[list[Tokenised]], published: Published, blobs: Blobs
    ) -> list[Addend]:
        """What is handed in for one version: trained, poisoned, measured, bounded; weights by staleness."""
        seed, version = at
        drawn = np.random.default_rng([seed, version]).permutation(len(RANKS))[:BUFFER_SIZE]
        found = []
        for place, device in enumerate(int(d) for d in drawn):
            begin, hostile = max(0, version - place % 2), device in HOSTILE and version >= HONEST_VERSIONS
            if hostile and case.attack == "absent":
                continue
            start = self._start(case, device, begin, (seed, version), published)
            plan = trainer.Plan(
                TRAINING.steps, TRAINING.batch, TRAINING.batch, 64, TRAINING.learning_rate_at(begin)
            )
            adapter = self._trainer.train(start, data[device], plan, on_step=_go_on).adapter
            begun = {n: published.module(begin, n, s) for n, s in self._shapes.items()}
            if hostile:
                adapter = _poisoned(case.rule, adapter, begun, TIMES[case.attack])
            changes = {n: RULES[case.rule].change(f, begun[n]) for n, f in adapter.items()}
            norms, choices = measure(changes.items()), case.admission
            factor = admit(norms, bound(published.norms[-choices.history :], choices), refuse=False)
            published.norms.append((str(device), factor * norms.total))
            path = blobs.path(blobs.write([encode(adapter, SCALING)]))
            carried = RANK_CAP if RULES[case.rule].carries else 0
            weight = (1.0 + version - begin) ** -0.5
            found.append((str(device), weight, path, RANKS[device], published.starts[begin], carried, factor))
        total = sum(weight for _, weight, *_ in found)
        return [Addend(u, w / total, p, r, s, c, factor=f) for u, w, p, r, s, c, f in found]

    def _start(
        self, case: Case, device: int, begin: int, at: tuple[int, int], published: Published
    ) -> trainer.Start:
        """What the household begins with, as the coordinator serves it. Under `carry` all of G is held."""
        rule, rank, seed = RULES[case.rule], RANKS[device], at[0] * 10_000 + at[1] * 10 + device
        stored = {n: published.module(begin, n, s) for n, s in self._shapes.items()}
        if rule.carries:
            held = {
                n: rule.serve(f, live_rank(f), "balanced", n).leading(live_rank(f)) for n, f in stored.items()
            }
            return trainer.Start(None, held, rank, seed)
        served = {
            n: rule.serve(f, min(rank, *f.shape), "balanced", f"{begin}/{n}") for n, f in stored.items()
        }
        return trainer.Start(served, None, rank, seed)


def _go_on(_: trainer.StepReport) -> Literal["continue"]:
    return "continue"


def _poisoned(rule: RuleName, adapter: Adapter, begun: Adapter, times: float) -> Adapter:
    """`times` the change, in an adapter of the rank that was assigned: all that a hostile device may send."""
    if RULES[rule].carries:
        return {n: LoraFactors(np.float32(times) * f.b, f.a) for n, f in adapter.items()}
    found = {}
    for name, end in adapter.items():
        start = begun[name].leading(end.rank)
        state = combine([(times, end), (1.0 - times, start)], end.rank).factors
        missing = end.rank - state.rank
        assert missing == 0
        found[name] = state
    return found


def table(rule: RuleName, results: Results, seeds: Sequence[int], versions: int) -> Table:
    """The last held-out loss of each attack (columns) under each defence."""
    shown = Table(title=f"Rule {rule}: held-out loss after {versions} versions", title_justify="left")
    shown.add_column("defence")
    for attack in ATTACKS:
        shown.add_column(attack, justify="right")
    rows: dict[Defence, list[str]] = {defence: [] for defence in DEFENCES}
    for defence, cells in rows.items():
        for attack in ATTACKS:
            found = [results.rows.get(_key(Case(rule, attack, defence), s, versions)) for s in seeds]
            last = [losses[str(versions)] for losses in found if losses is not None]
            cells.append(spread(last) if last else "–")
        shown.add_row(DEFENCES[defence], *cells)
    absent = [results.rows.get(_key(Case(rule, "absent", "none"), s, versions)) for s in seeds]
    last = [losses[str(versions)] for losses in absent if losses is not None]
    shown.add_row("without them", spread(last) if last else "–")
    return shown


def _key(case: Case, seed: int, versions: int) -> str:
    return f"{versions}/{case.rule}/{case.attack}/{case.defence}/{seed}"


def cases(rule: RuleName, quick: bool) -> list[Case]:
    """All of a rule's table, the plainest first."""
    defences: list[Defence] = ["none", "geometric_median"] if quick else list(DEFENCES)
    attacks: Sequence[Attack] = ("reversed",) if quick else ATTACKS
    return [
        Case(rule, "absent", "none"),
        *(Case(rule, attack, defence) for attack in attacks for defence in defences),
    ]


def main() -> int:
    """Measure, print the tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one rule, one seed and few versions")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    cpu = cpu_name(Path("/proc/cpuinfo"), Path("/proc/device-tree/model")) or platform.processor()
    results = Results(options.json, {"cpu": cpu, "threads": os.environ.get("OMP_NUM_THREADS", "all")})
    versions = 4 if options.quick else 12
    seeds = range(1 if options.quick else options.seeds)
    rules = RULE_NAMES[:1] if options.quick else RULE_NAMES
    federation = Federation()
    for seed in seeds:  # seeds outside, so that a run that is stopped leaves whole comparisons
        for rule in rules:
            for case in cases(rule, options.quick):
                losses: Any = results.get(
                    _key(case, seed, versions), lambda c=case, s=seed: federation.run(c, s, versions)
                )
                last = losses[str(versions)]
                shown = f"{last:.3f}" if math.isfinite(last) else "lost"
                console.print(f"seed {seed}  {rule:<9} {case.attack:<9} {case.defence:<17} {shown}")
    for rule in rules:
        console.print(table(rule, results, list(seeds), versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
