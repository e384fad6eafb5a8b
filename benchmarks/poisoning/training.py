"""Poisoned updates in real training: ten households, the embedded base, the coordinator's own merge.

Ten smart-home households (examples/smart_home.py) of ranks 2, 4 and 8; a version merges five updates, half of
them from the version before. The first three versions are honest and merged without a defence, the same for
all lines. From then on two households of ten are hostile. Updates are files, and are measured, bounded and
merged by the coordinator's own code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks.common.federation import (
    RANK_CAP,
    SCALING,
    Base,
    Homes,
    Turn,
    drawn,
    grown,
    half_stale,
    plan_of,
)
from benchmarks.common.files import Files
from benchmarks.poisoning.toy import TIMES, Case, Known
from coordinator.engine.weights import polynomial
from coordinator.merging.admission import admit, measure
from coordinator.merging.sources import Addend, StartVersion
from coordinator.rules.named import rule_named, served
from edge_sdk.core import messages
from edge_sdk.core.flexlora import combine, live_rank
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Training
from edge_sdk.training.plan import Start as TrainingStart

RANKS = (2, 4, 8, 2, 4, 2, 4, 8, 2, 4)  # of the ten households
HOSTILE = (1, 6)
HONEST_VERSIONS = 3  # before the attack: 15 updates, a history to learn a bound from
BUFFER_SIZE = 5
TRAINING = Training(steps=10, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.96)
TEST_PER_INTENT = 6
SETTINGS = {"training": asdict(TRAINING), "ranks": RANKS, "hostile": HOSTILE, "buffer_size": BUFFER_SIZE}


@dataclass
class Past:
    """The versions so far, and the norms of accepted updates."""

    files: Files
    versions: list[StartVersion] = field(default_factory=lambda: [StartVersion(0)])
    known: Known = field(default_factory=Known)  # of norms

    def branch(self) -> Past:
        """The same past, for another future: its bound, if it has one, is learnt from the honest versions."""
        return Past(self.files, list(self.versions), Known(dict(self.known.latest)))


class Federation:
    """One base, loaded once; `run` trains a federation on it. Its files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = Base()
        self._before: dict[tuple[str, int], tuple[Past, float]] = {}

    def run(self, case: Case, seed: int, last: int) -> dict[str, float]:
        """Train until version `last`; loss on held-out rows (nats a token) before the attack, and there."""
        homes = Homes(self._base, len(RANKS), TEST_PER_INTENT, seed, TRAINING.sequence_len)
        if (case.rule, seed) not in self._before:
            self._before[case.rule, seed] = self._honest(case.rule, seed, homes)
        past, loss = self._before[case.rule, seed]
        attacked = past.branch()
        self._grow(case, seed, last, homes, attacked)
        return {str(HONEST_VERSIONS): loss, str(last): self._loss(attacked, homes)}

    def _honest(self, rule: str, seed: int, homes: Homes) -> tuple[Past, float]:
        """The versions before the attack, and the loss of the last of them."""
        record = messages.Federation(
            "poisoned", self._base.record, rule, (2, 4, 8), RANK_CAP, SCALING, "balanced", TRAINING
        )
        made = Past(Files(record, self._folder / f"{rule}-{seed}"))
        self._grow(Case(rule, "nobody", "none"), seed, HONEST_VERSIONS, homes, made)
        return made, self._loss(made, homes)

    def _loss(self, past: Past, homes: Homes) -> float:
        """Of the newest version."""
        return self._base.loss(past.files.adapter(past.versions[-1]), homes.test)

    def _grow(self, case: Case, seed: int, last: int, homes: Homes, past: Past) -> None:
        """Train and merge until version `last`."""

        def taking_part(version: int) -> list[Turn]:
            taking = half_stale(drawn(len(RANKS), BUFFER_SIZE, seed, version), version)
            return [turn for turn in taking if not (case.attack == "absent" and _is_hostile(turn))]

        def train(turn: Turn) -> Addend:
            return self._update(case, seed, turn, homes, past)

        def merge(addends: list[Addend]) -> StartVersion:
            total = sum(addend.weight for addend in addends)
            shares = [replace(addend, weight=addend.weight / total) for addend in addends]
            return past.files.merge(past.versions[-1], shares, admission=case.admission)[0]

        for _ in grown(past.versions, last, taking_part, train, merge):
            pass

    def _update(self, case: Case, seed: int, turn: Turn, homes: Homes, past: Past) -> Addend:
        """What a household hands in: trained, poisoned, measured, bounded; its weight by staleness."""
        start = self._start(case, seed, turn, past)
        adapter = self._base.train(start, homes.train[turn.device], plan_of(TRAINING, turn.begin)).adapter
        begun = start.adapter or self._base.empty()
        if _is_hostile(turn):
            adapter = _poisoned(case.rule, adapter, begun, TIMES[case.attack])
        changes = {n: rule_named(case.rule).change(f, begun[n]) for n, f in adapter.items()}
        norms, choices = measure(changes.items()), case.admission
        factor = admit(norms, past.known.bound(choices), refuse=False)
        past.known.latest[turn.device] = factor * norms.total
        return Addend(
            str(turn.device),
            polynomial(turn.version - turn.begin),
            past.files.keep(adapter),
            RANKS[turn.device],
            past.versions[turn.begin],
            RANK_CAP if rule_named(case.rule).carries else 0,
            factor=factor,
        )

    def _start(self, case: Case, seed: int, turn: Turn, past: Past) -> TrainingStart:
        """What the household begins with, as the coordinator serves it. Under `carry` all of G is held."""
        rule, rank = rule_named(case.rule), RANKS[turn.device]
        own_seed = seed * 10_000 + turn.version * 10 + turn.device
        stored = past.files.adapter(past.versions[turn.begin]) or self._base.empty()
        if rule.carries:
            held = {
                n: rule.serve(f, live_rank(f), "balanced", n).leading(live_rank(f)) for n, f in stored.items()
            }
            return TrainingStart(None, held, rank, own_seed)
        given = {
            n: served(past.files.federation, turn.begin, n, f, min(rank, *f.shape)) for n, f in stored.items()
        }
        return TrainingStart(given, None, rank, own_seed)


def _is_hostile(turn: Turn) -> bool:
    """Whether that household is one of the hostile ones, and the attack has begun."""
    return turn.device in HOSTILE and turn.version >= HONEST_VERSIONS


def _poisoned(rule: str, adapter: Adapter, begun: Adapter, times: float) -> Adapter:
    """`times` the change, in an adapter of the rank that was assigned: all that a hostile device may send."""
    if rule_named(rule).carries:
        return {n: LoraFactors(np.float32(times) * f.b, f.a) for n, f in adapter.items()}
    return {
        name: combine([(times, end), (1.0 - times, begun[name])], end.rank).factors
        for name, end in adapter.items()
    }
