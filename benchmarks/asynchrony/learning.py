"""What a virtual federation really learns: the embedded base in NF4, the real trainer, the real aggregation.

One process, one base, loaded once. A device of a federation in virtual time trains here at the moment that
its update is accepted, from the version that it was given. Updates and versions are files in a folder, as on
a coordinator's disk, and `coordinator.merging.aggregation` makes the one from the other. Rule `carry`, the
default: devices hold the whole global adapter frozen in int8 and train fresh factors on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.asynchrony.simulation import Work
from benchmarks.common.clients import Task
from benchmarks.common.federation import RANK_CAP, SCALING, Base, live_parts, plan_of
from benchmarks.common.files import Files
from coordinator.engine.events import Merge
from coordinator.merging.sources import Addend, StartVersion
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Federation, Training
from edge_sdk.training.plan import Start

RANKS = (2, 4, 8, 16)
TRAINING = Training(steps=6, batch=4, sequence_len=128, learning_rate=2e-3, learning_rate_decay=0.97)


@dataclass(frozen=True)
class Update:
    """A file of what a device trained."""

    path: Path
    version: int
    rank: int
    carry_rank: int


class RealLearner:
    """Trains and merges for one federation.

    Args:
        base: loaded.
        clients: one for each device.
        folder: for updates and versions; empty.
        eta: the server's learning rate.
        seed: of the order of rows and of fresh factors, with the assignment.
    """

    def __init__(self, base: Base, clients: Sequence[Task], folder: Path, eta: float, seed: int) -> None:
        self._base, self._eta, self._seed = base, eta, seed
        self._train_rows = [base.rows(task.train, TRAINING.sequence_len) for task in clients]
        self._test_rows = [base.rows(task.test, TRAINING.sequence_len) for task in clients]
        federation = Federation(
            id="async-vs-sync",
            base=base.record,
            rule="carry",
            ladder=RANKS,
            rank_cap=RANK_CAP,
            scaling=SCALING,
            split="balanced",
            training=TRAINING,
        )
        self._files = Files(federation, folder)
        self._versions: dict[int, StartVersion] = {0: StartVersion(0)}
        self._updates: dict[str, Update] = {}
        self._turns = [0] * len(clients)

    def train(self, work: Work) -> int:
        """Train on the device's own rows from its version; the file of the update is kept."""
        whole = self._adapter(work.version)
        turn = self._turns[work.device]
        self._turns[work.device] += 1
        # The n-th update of a device sees the same rows and the same fresh factors under all policies.
        seed = int(hashlib.sha256(f"{self._seed}/{work.device}/{turn}".encode()).hexdigest()[:8], 16)
        start = Start(None, whole and live_parts(whole), work.rank, seed, "int8")
        plan = replace(plan_of(TRAINING, work.version), steps=work.steps)
        done = self._base.train(start, self._train_rows[work.device], plan)
        path = self._files.keep(done.adapter, self._files.federation.upload_dtype)
        self._updates[work.update] = Update(path, work.version, work.rank, work.carry_rank)
        return done.examples

    def merge(self, effect: Merge) -> int:
        """Aggregate files into the next version's."""
        current = self._versions[effect.version - 1]
        addends = []
        for buffered, weight, _ in effect.weights:
            update = self._updates.pop(buffered.update)
            start = self._versions[update.version]
            addends.append(
                Addend(buffered.update, weight, update.path, update.rank, start, update.carry_rank)
            )
        self._versions[effect.version], rank = self._files.merge(current, addends, self._eta)
        for addend in addends:
            addend.path.unlink(missing_ok=True)
        return rank

    def loss(self, version: int) -> float:
        """Mean over clients of the loss per label token on their held-out rows (nats)."""
        adapter = self._adapter(version)
        return fmean(self._base.loss(adapter, test) for test in self._test_rows)

    def _adapter(self, version: int) -> Adapter | None:
        """The global adapter of a version; None for version 0."""
        return self._files.adapter(self._versions[version])
