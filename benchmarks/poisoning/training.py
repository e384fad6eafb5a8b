"""Poisoned updates in real training: ten households, the embedded base, the coordinator's own merge.

Ten smart-home households (examples/smart_home.py) of ranks 2, 4 and 8; a version merges five updates, half of
them from the version before. The first three versions are honest and merged without a defence, the same for
all lines. From then on two households of ten are hostile. Updates are files, and are measured, bounded and
merged by the coordinator's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.poisoning.toy import TIMES, Case
from coordinator.merging.admission import admit, bound, measure
from coordinator.merging.aggregation import Addend, Start, aggregate
from coordinator.rules import RULES, served
from coordinator.storage.blobs import Blobs
from edge_sdk.core import messages
from edge_sdk.core.adapter_file.codec import encode, open_own
from edge_sdk.core.flexlora import combine, live_rank
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import RuleName, Training
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, StepReport
from edge_sdk.training.plan import Start as TrainingStart
from edge_sdk.training.trainer import Trainer
from examples import smart_home

SCALING, RANK_CAP = 2.0, 32
RANKS = (2, 4, 8, 2, 4, 2, 4, 8, 2, 4)  # of the ten households
HOSTILE = (1, 6)
HONEST_VERSIONS = 3  # before the attack: 15 updates, a history to learn a bound from
BUFFER_SIZE = 5
TRAINING = Training(steps=10, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.96)
TEST_PER_INTENT = 6


@dataclass
class Published:
    """The versions so far, as files, the norms of accepted updates, and losses by version."""

    blobs: Blobs
    starts: list[Start] = field(default_factory=lambda: [Start(0)])
    norms: list[tuple[str, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)

    def module(self, version: int, name: str, shape: tuple[int, int]) -> LoraFactors:
        """The stored factors of a version; empty for version 0."""
        path = self.starts[version].path
        return open_own(path, SCALING).module(name) if path else LoraFactors.empty(*shape)


class Federation:
    """One base, loaded once; `run` trains a federation on it. Its files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[tuple[RuleName, int], Published] = {}
        base = base_model.load("tiny", device="cpu")
        self._base = base_model.describe("tiny")
        self._shapes = self._base.modules
        self._trainer = Trainer(base, self._shapes, SCALING, progress=False)

    def _rows(self, records: Sequence[Mapping[str, str]]) -> list[Tokenised]:
        tokenizer = self._trainer.base.tokenizer
        return [tokenise(parse_record(dict(r)), tokenizer, TRAINING.sequence_len) for r in records]

    def run(self, case: Case, seed: int, versions: int) -> dict[str, float]:
        """Train `versions` versions; held-out loss (nats a token, all intents) before the attack and last."""
        homes = smart_home.households(len(RANKS), seed)
        data = [self._rows(home.train) for home in homes]
        held_out = self._rows(smart_home.test_set(smart_home.INTENTS, TEST_PER_INTENT, seed))
        published = self._honest(case.rule, seed, data)
        if not published.losses:
            published.losses[str(HONEST_VERSIONS)] = self._loss(published, held_out)
        attacked = Published(published.blobs, list(published.starts), list(published.norms))
        for version in range(HONEST_VERSIONS, versions):
            self._publish(case, (seed, version), data, attacked)
        return published.losses | {str(versions): self._loss(attacked, held_out)}

    def _loss(self, published: Published, held_out: list[Tokenised]) -> float:
        """Of the newest version."""
        path = published.starts[-1].path
        assert path is not None
        return self._trainer.evaluate(dict(open_own(path, SCALING).modules()), held_out).loss

    def _honest(self, rule: RuleName, seed: int, data: list[list[Tokenised]]) -> Published:
        """The versions before the attack, trained at the first call for them."""
        if (rule, seed) not in self._before:
            made = Published(Blobs(self._folder / f"{rule}-{seed}"))
            for version in range(HONEST_VERSIONS):
                self._publish(Case(rule, "nobody", "none"), (seed, version), data, made)
            self._before[rule, seed] = made
        return self._before[rule, seed]

    def _publish(
        self, case: Case, at: tuple[int, int], data: list[list[Tokenised]], published: Published
    ) -> None:
        """Train and merge version `at[1] + 1`."""
        addends = self._updates(case, at, data, published)
        current, blobs, eta = published.starts[at[1]], published.blobs, 1.0
        outcome = aggregate(self._federation(case.rule), eta, current, addends, blobs.write, case.admission)
        published.starts.append(Start(at[1] + 1, blobs.path(outcome.digest)))

    def _federation(self, rule: RuleName) -> messages.Federation:
        return messages.Federation(
            "poisoned", self._base, rule, (2, 4, 8), RANK_CAP, SCALING, "balanced", TRAINING
        )

    def _updates(
        self, case: Case, at: tuple[int, int], data: list[list[Tokenised]], published: Published
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
            plan = Plan(
                TRAINING.steps,
                TRAINING.batch,
                TRAINING.batch,
                TRAINING.sequence_len,
                TRAINING.learning_rate_at(begin),
            )
            adapter = self._trainer.train(start, data[device], plan, on_step=_go_on).adapter
            begun = start.adapter or {n: LoraFactors.empty(*s) for n, s in self._shapes.items()}
            if hostile:
                adapter = _poisoned(case.rule, adapter, begun, TIMES[case.attack])
            changes = {n: RULES[case.rule].change(f, begun[n]) for n, f in adapter.items()}
            norms, choices = measure(changes.items()), case.admission
            factor = admit(norms, bound(published.norms[-choices.history :], choices), refuse=False)
            published.norms.append((str(device), factor * norms.total))
            path = published.blobs.path(published.blobs.write([encode(adapter, SCALING)]))
            carried = RANK_CAP if RULES[case.rule].carries else 0
            weight = (1.0 + version - begin) ** -0.5
            found.append((str(device), weight, path, RANKS[device], published.starts[begin], carried, factor))
        total = sum(weight for _, weight, *_ in found)
        return [Addend(u, w / total, p, r, s, c, factor=f) for u, w, p, r, s, c, f in found]

    def _start(
        self, case: Case, device: int, begin: int, at: tuple[int, int], published: Published
    ) -> TrainingStart:
        """What the household begins with, as the coordinator serves it. Under `carry` all of G is held."""
        rule, rank, seed = RULES[case.rule], RANKS[device], at[0] * 10_000 + at[1] * 10 + device
        stored = {n: published.module(begin, n, s) for n, s in self._shapes.items()}
        if rule.carries:
            held = {
                n: rule.serve(f, live_rank(f), "balanced", n).leading(live_rank(f)) for n, f in stored.items()
            }
            return TrainingStart(None, held, rank, seed)
        given = {
            n: served(self._federation(case.rule), begin, n, f, min(rank, *f.shape))
            for n, f in stored.items()
        }
        return TrainingStart(given, None, rank, seed)


def _go_on(_: StepReport) -> Literal["continue"]:
    return "continue"


def _poisoned(rule: RuleName, adapter: Adapter, begun: Adapter, times: float) -> Adapter:
    """`times` the change, in an adapter of the rank that was assigned: all that a hostile device may send."""
    if RULES[rule].carries:
        return {n: LoraFactors(np.float32(times) * f.b, f.a) for n, f in adapter.items()}
    return {
        name: combine([(times, end), (1.0 - times, begun[name])], end.rank).factors
        for name, end in adapter.items()
    }
