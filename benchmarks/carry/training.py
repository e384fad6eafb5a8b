"""A federation in one process on the embedded base: the real trainer and merge, no network, no clock.

Six smart-home households (examples/smart_home.py). Every version merges four updates, half of them from the
version before (staleness 1), as in a buffered federation; which devices these are, and which have the stale
version, follows from the seed alone, so that every choice sees the same data in the same order.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.common.federation import (
    Base,
    Homes,
    Turn,
    Update,
    drawn,
    fresh_factors,
    grown,
    half_stale,
    merged,
    plan_of,
)
from coordinator.rules.named import rule_named
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.flexlora import live_rank, serve, split
from edge_sdk.core.lora import Adapter, LoraFactors, stacked
from edge_sdk.core.messages import Training
from edge_sdk.training.plan import Plan, Start

HOUSEHOLDS, BUFFER_SIZE = 6, 4
TRAINING = Training(steps=16, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.96)
TEST_PER_INTENT = 6
SETTINGS = {"training": asdict(TRAINING), "households": HOUSEHOLDS, "buffer_size": BUFFER_SIZE}

Fresh = Literal["random", "top", "warm", "some"]


@dataclass(frozen=True)
class Choice:
    """What every device does. `rank` 1 costs 16 bytes a value, a carried component what its dtype says.

    `fresh`: how the factors to train begin under `carry`. `random`: B = 0, A random. `top`: B = 0, A the
    first right singular vectors of the carried adapter. `warm`: the first components of the carried adapter
    are trained themselves, and the others carried. `some`: likewise, but a random subset of them.
    """

    rule: str
    rank: int
    carry_rank: int = 0
    dtype: CarriedDtype = "float32"
    fresh: Fresh = "random"
    rate: float = 1.0  # factor on the learning rate
    wide: float = 1.0  # factor on the rows of a random A
    steps: int = TRAINING.steps

    @property
    def name(self) -> str:
        """A key for tables and files."""
        text = f"{self.rule} r={self.rank}"
        if self.rule == "carry":
            text += f" c={self.carry_rank} {self.dtype}"
        text += "" if self.fresh == "random" else f" {self.fresh}"
        text += "" if self.rate == 1.0 else f" rate×{self.rate:g}"
        text += "" if self.wide == 1.0 else f" A×{self.wide:g}"
        return text if self.steps == TRAINING.steps else f"{text} steps={self.steps}"


@dataclass(frozen=True)
class Outcome:
    """Held-out losses (mean over all intents, nats per token) after some versions; seconds of a step."""

    losses: dict[str, float]
    step_s: float


class Road:
    """How files travel between the coordinator and a device: here they arrive as they were sent."""

    def down(self, start: Start, turn: Turn) -> Start:
        """What a device begins with, of what the coordinator serves."""
        return start

    def up(self, adapter: Adapter, turn: Turn) -> Adapter:
        """What the coordinator receives, of what a device trained."""
        return adapter


STRAIGHT = Road()


class Federation:
    """Six households on one base, which is loaded once. A version merges four, half of them stale."""

    def __init__(self) -> None:
        self.base = Base()

    def homes(self, seed: int) -> Homes:
        """Whose text a seed's federations train on."""
        return Homes(self.base, HOUSEHOLDS, TEST_PER_INTENT, seed, TRAINING.sequence_len)

    def run(self, choices: Sequence[Choice], seed: int, last: int, every: int) -> Outcome:
        """Train until version `last`, household i by `choices[i]`; held-out loss after every `every`."""
        homes, steps_s = self.homes(seed), list[float]()
        losses = {
            str(number): self.base.loss(adapter, homes.test)
            for number, adapter in self.versions(choices, homes, seed, last, steps_s)
            if number % every == 0 or number == last
        }
        return Outcome(losses, statistics.median(steps_s))

    def versions(
        self,
        choices: Sequence[Choice],
        homes: Homes,
        seed: int,
        last: int,
        steps_s: list[float],
        road: Road = STRAIGHT,
    ) -> Iterator[tuple[int, Adapter]]:
        """Each version and its number. Seconds of a step are added to `steps_s`, one for each update."""
        history: list[Adapter] = [self.base.empty()]

        def train(turn: Turn) -> Update:
            choice = choices[turn.device]
            own_seed = seed * 10_000 + turn.version * 10 + turn.device
            start = road.down(self._start(choice, history[turn.begin], own_seed), turn)
            done = self.base.train(start, homes.train[turn.device], _plan(choice, turn.begin))
            steps_s.append(done.step_s)
            return Update(turn, _changes(choice, start, road.up(done.adapter, turn)), choice.carry_rank)

        rule = rule_named(choices[0].rule)
        return grown(
            history,
            last,
            lambda version: half_stale(drawn(HOUSEHOLDS, BUFFER_SIZE, seed, version), version),
            train,
            lambda updates: merged(rule, history, updates)[0],
        )

    def _start(self, choice: Choice, whole: Adapter, seed: int) -> Start:
        """What a device begins with, as the service would hand it out."""
        if choice.rule == "flexlora":
            served = {n: serve(f, min(choice.rank, *f.shape), "balanced", n) for n, f in whole.items()}
            return Start(served, None, choice.rank, seed)
        kept = {n: min(choice.carry_rank, live_rank(f)) for n, f in whole.items()}
        carried: Adapter = {n: split(f.leading(kept[n]), "balanced") for n, f in whole.items()}
        if choice.fresh == "top":
            fresh: Adapter = {n: _top(f, choice.rank) for n, f in whole.items()}
        elif choice.fresh in ("warm", "some"):
            fresh, carried = _parted(carried, choice, seed)
        else:
            fresh = fresh_factors(self.base.shapes, choice.rank, choice.wide, seed)
        return Start(fresh, carried, choice.rank, seed, choice.dtype)


def _plan(choice: Choice, begin: int) -> Plan:
    """An assignment from version `begin`, of as many examples a version whatever its length."""
    plan = plan_of(TRAINING, begin)
    return replace(plan, steps=choice.steps, learning_rate=plan.learning_rate * choice.rate)


def _parted(carried: Adapter, choice: Choice, seed: int) -> tuple[Adapter, Adapter]:
    """Of what a device holds: the components that it trains themselves, and those that stay frozen."""
    first, rest = {}, {}
    for place, (name, f) in enumerate(carried.items()):
        order = np.arange(f.rank)
        if choice.fresh == "some":
            order = np.random.default_rng([seed, place]).permutation(f.rank)
        own, others = np.sort(order[: choice.rank]), np.sort(order[choice.rank :])
        first[name] = LoraFactors(f.b[:, own], f.a[own])
        rest[name] = LoraFactors(f.b[:, others], f.a[others])
    return first, rest


def _changes(choice: Choice, start: Start, adapter: Adapter) -> Adapter:
    """What a device changed: all of its factors, or (warm) these less the components that it began with."""
    if choice.fresh not in ("warm", "some") or start.adapter is None:
        return adapter
    begun = start.adapter
    return {name: stacked([(1.0, after), (-1.0, begun[name])]) for name, after in adapter.items()}


def _top(canonical: LoraFactors, rank: int) -> LoraFactors:
    """B = 0, A the first live right singular vectors; the rest is filled up at random by the trainer."""
    kept = min(rank, live_rank(canonical), *canonical.shape)
    return LoraFactors(np.zeros((canonical.shape[0], kept), np.float32), canonical.a[:kept])
