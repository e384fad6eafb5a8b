"""What a virtual federation really learns: the embedded base in NF4, the real trainer, the real aggregation.

One process, one base, loaded once. A device of a federation in virtual time trains here at the moment that
its update is accepted, from the version that it was given. Updates and versions are files in a folder, as on
a coordinator's disk, and `coordinator.merging.aggregation` makes the one from the other. Rule `carry`, the
default: devices hold the whole global adapter frozen in int8 and train fresh factors on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.asynchrony.simulation import Work
from benchmarks.common.clients import Task
from coordinator.engine.events import Merge
from coordinator.merging.aggregation import Addend, aggregate
from coordinator.merging.aggregation import Start as Merging
from coordinator.storage.blobs import Blobs
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.flexlora import live_rank, split
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Federation, Training
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, Start
from edge_sdk.training.trainer import Trainer

RANKS, RANK_CAP, SCALING = (2, 4, 8, 16), 32, 2.0
TRAINING = Training(steps=6, batch=4, sequence_len=128, learning_rate=2e-3, learning_rate_decay=0.97)


class Base:
    """The embedded base and its trainer: what all federations of a grid share."""

    def __init__(self) -> None:
        self.record = base_model.describe("tiny")
        base = base_model.load("tiny", device="cpu")
        self.trainer = Trainer(base, self.record.modules, SCALING, progress=False)

    def tokens(self, text: str) -> int:
        """How many tokens `text` has with the base's tokenizer."""
        return len(self.trainer.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rows(self, task: Task) -> tuple[list[Tokenised], list[Tokenised]]:
        """A client's rows for training, and those that are held out."""
        tokenizer, length = self.trainer.base.tokenizer, TRAINING.sequence_len
        both = (
            [tokenise(parse_record(dict(row)), tokenizer, length) for row in rows]
            for rows in (task.train, task.test)
        )
        train, test = both
        return train, test


@dataclass(frozen=True)
class Update:
    """A file of what a device trained."""

    digest: str
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
        self._rows = [base.rows(task) for task in clients]
        self._blobs = Blobs(folder)
        self._federation = Federation(
            id="async-vs-sync",
            base=base.record,
            rule="carry",
            ladder=RANKS,
            rank_cap=RANK_CAP,
            scaling=SCALING,
            split="balanced",
            training=TRAINING,
        )
        self._versions: dict[int, Merging] = {0: Merging(0)}
        self._updates: dict[str, Update] = {}
        self._turns = [0] * len(clients)

    def train(self, work: Work) -> int:
        """Train on the device's own rows from its version; the file of the update is kept."""
        carried = self._adapter(work.version)
        live = carried and {n: split(f.leading(live_rank(f)), "balanced") for n, f in carried.items()}
        turn = self._turns[work.device]
        self._turns[work.device] += 1
        # The n-th update of a device sees the same rows and the same fresh factors under all policies.
        seed = int(hashlib.sha256(f"{self._seed}/{work.device}/{turn}".encode()).hexdigest()[:8], 16)
        start = Start(None, live, work.rank, seed, "int8")
        plan = Plan(
            work.steps,
            TRAINING.batch,
            TRAINING.batch,
            TRAINING.sequence_len,
            TRAINING.learning_rate_at(work.version),
        )
        done = self._base.trainer.train(start, self._rows[work.device][0], plan, on_step=lambda _: "continue")
        digest = self._blobs.write([codec.encode(done.adapter, SCALING, self._federation.upload_dtype)])
        self._updates[work.update] = Update(digest, work.version, work.rank, work.carry_rank)
        return done.examples

    def merge(self, effect: Merge) -> int:
        """Aggregate files into the next version's."""
        current = self._versions[effect.version - 1]
        addends = []
        for buffered, weight, _ in effect.weights:
            update = self._updates.pop(buffered.update)
            start = self._versions[update.version]
            path = self._blobs.path(update.digest)
            addends.append(Addend(buffered.update, weight, path, update.rank, start, update.carry_rank))
        outcome = aggregate(self._federation, self._eta, current, addends, self._blobs.write)
        self._versions[effect.version] = Merging(effect.version, self._blobs.path(outcome.digest))
        for addend in addends:
            addend.path.unlink(missing_ok=True)
        return outcome.rank

    def loss(self, version: int) -> float:
        """Mean over clients of the loss per label token on their held-out rows (nats)."""
        adapter = self._adapter(version)
        return fmean(self._base.trainer.evaluate(adapter, test).loss for _, test in self._rows)

    def _adapter(self, version: int) -> Adapter | None:
        """The global adapter of a version; None for version 0."""
        path = self._versions[version].path
        return dict(codec.open_own(path, SCALING).modules()) if path else None
