"""Federations in virtual time that are compared: policies and seeds.

A row keeps its whole curve. Seeds are the outer loop, so that the log of a grid that is not yet done holds
whole comparisons.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.asynchrony.devices import MEDIAN_TRAIN_S, draw, median_step_s
from benchmarks.asynchrony.learning import TRAINING, RealLearner
from benchmarks.asynchrony.policies import TUNING_SEEDS, Way, Ways
from benchmarks.asynchrony.report import Goal
from benchmarks.asynchrony.simulation import Conditions, Learner, Published, VirtualDevice, VirtualFederation
from benchmarks.common.clients import NaturalInstructions, SmartHome, Task, check_there
from benchmarks.common.federation import RANK_CAP, Base
from benchmarks.common.results import Results
from benchmarks.rules.grid import dealt
from coordinator.engine.engine import Engine

Row = dict[str, Any]

CONDITIONS = Conditions(drop_out=0.2, away_s=MEDIAN_TRAIN_S)
EVALUATED = 8  # updates between two looks at the loss, at least
DEVICES, TEST_ROWS = 40, 4  # held-out rows of each client
HOUSEHOLDS = 12  # of --quick
SETTINGS = {"conditions": asdict(CONDITIONS), "rank_cap": RANK_CAP, "devices": DEVICES}
MOST_S = 30 * 24 * 3600.0  # virtual


@dataclass(frozen=True)
class Case:
    """One federation. It runs until its updates are merged, and on until the goal's loss is reached too, or
    twice the goal's updates are merged.
    """

    data: str
    label: str
    way: Way
    seed: int
    goal: Goal

    @property
    def updates(self) -> int:
        """How many it makes at least."""
        return self.way.longer * self.goal.updates

    @property
    def most_updates(self) -> int:
        """The end, whatever was reached."""
        return 2 * self.goal.updates

    @property
    def key(self) -> Row:
        """What tells it from all others among the results."""
        return {
            "data": self.data,
            "seed": self.seed,
            "settings": asdict(self.way.policy),
            "partial": self.way.partial,
            "training": asdict(TRAINING),
            "goal": asdict(self.goal),
            "longer": self.way.longer,
        }


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
        self._base = Base()
        self._source = NaturalInstructions(data, self._base.tokens) if data else None
        self._results, self._said = results, said

    def run(self, cases: Sequence[Case]) -> list[Row]:
        """The rows of `cases`, in their order, each labelled; each is run unless the log has it."""
        return [self._row(case) for case in cases]

    def _row(self, case: Case) -> Row:
        found = self._results.get(case.key, lambda: self._run(case))
        return {**case.key, **found, "policy": case.label}

    def clients(self, seed: int) -> tuple[Task, ...]:
        """Whose text the devices of a seed have."""
        if self._source is None:
            return SmartHome(HOUSEHOLDS).clients(seed).participants
        return self._source.many(DEVICES, TEST_ROWS, seed, TUNING_SEEDS)

    def _run(self, case: Case) -> Row:
        clients = self.clients(case.seed)
        devices = drawn(len(clients), case.seed)
        with tempfile.TemporaryDirectory() as folder:
            eta = case.way.policy.server_learning_rate
            learner = RealLearner(self._base, clients, Path(folder), eta, case.seed)
            row = followed(case, devices, learner)
        last = row["curve"][-1]
        self._said(
            f"{case.label}, seed {case.seed}: loss {last['loss']:.3f} after {last['updates']} updates, "
            f"{last['at_s'] / 3600:.1f} virtual hours ({row['seconds']:.0f} s)"
        )
        return row


def drawn(count: int, seed: int) -> list[VirtualDevice]:
    """So many devices; ranks are the paper's uniform mix, and all carry the whole global adapter."""
    ranks = dealt("uniform", count, seed)
    devices = draw(ranks, TRAINING.steps, seed)
    assert abs(max(d.step_s for d in devices) / median_step_s(devices) - 50.0) < 1e-6
    return [replace(device, carry_rank=RANK_CAP) for device in devices]


def federation_of(
    way: Way, devices: Sequence[VirtualDevice], learner: Learner, seed: int
) -> VirtualFederation:
    """A new one, which nobody has asked for anything yet."""
    engine = Engine(way.policy, steps=TRAINING.steps)
    return VirtualFederation(engine, devices, replace(CONDITIONS, partial=way.partial), learner, seed)


def followed(case: Case, devices: Sequence[VirtualDevice], learner: RealLearner) -> Row:
    """Run a case; its curve of losses, and what became of all work."""
    began = time.monotonic()
    federation = federation_of(case.way, devices, learner, case.seed)
    trace = federation.trace
    curve = [{"at_s": 0.0, "version": 0, "updates": 0, "loss": learner.loss(0)}]

    def stop(published: Published) -> bool:
        merged, last = trace.merged, curve[-1]
        if merged // EVALUATED == last["updates"] // EVALUATED:
            return False
        loss = learner.loss(published.version)
        curve.append({"at_s": published.at_s, "version": published.version, "updates": merged, "loss": loss})
        if merged < case.updates:
            return False
        return merged >= case.most_updates or case.goal.time_s({"curve": curve}) is not None

    federation.run(stop, MOST_S)
    by_device = Counter(device for version in trace.versions for device in version.devices)
    return {
        "curve": curve,
        "ended_s": federation.now,
        "counts": dict(trace.counts),
        "trained_s": trace.trained_s,
        "wasted_s": trace.wasted_s,
        "updates_by_device": [by_device[place] for place in range(len(devices))],
        "devices": [asdict(device) for device in devices],
        "staleness": [tau for version in trace.versions for tau in version.staleness],
        "seconds": time.monotonic() - began,
    }


def cases(data: str, ways: Ways, seeds: Sequence[int], goal: Goal) -> list[Case]:
    """All ways on every seed."""
    return [Case(data, label, way, seed, goal) for seed in seeds for label, way in ways.items()]
