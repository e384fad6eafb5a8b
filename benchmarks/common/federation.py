"""A federation in one process: the embedded base, the real trainer and the real rules; no network, no clock.

Devices train one after another, each from the version that it is given, and what they send is merged into the
next version. Who takes part, whose update is stale, and every random number follow from a seed, so that what
is compared sees the same data in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from coordinator.engine.weights import polynomial
from coordinator.rules.rule import Change, Merging, Rule
from edge_sdk.core.flexlora import live_rank, pad, split
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.core.messages import Training
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, Start, StepReport
from edge_sdk.training.trainer import Trainer
from examples import smart_home

SCALING, RANK_CAP = 2.0, 32

Shapes = Mapping[str, tuple[int, int]]
"""Of each target module: (out, in)."""

ALL = 2**31  # components: more than any module has

Version = TypeVar("Version")
Sent = TypeVar("Sent")


class Base:
    """The embedded base in NF4 and its trainer, loaded once for any number of federations."""

    def __init__(self) -> None:
        self.record = base_model.describe("tiny")
        self.shapes = self.record.modules
        loaded = base_model.load("tiny", device="cpu")
        self._tokenizer = loaded.tokenizer
        self._trainer = Trainer(loaded, self.shapes, SCALING, progress=False)

    def tokens(self, text: str) -> int:
        """How many tokens `text` has with the base's tokenizer."""
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def rows(self, records: Sequence[Mapping[str, str]], length: int) -> list[Tokenised]:
        """Records as rows of at most `length` tokens."""
        return [tokenise(parse_record(dict(record)), self._tokenizer, length) for record in records]

    def train(self, start: Start, rows: Sequence[Tokenised], plan: Plan) -> Trained:
        """One assignment, all of its steps."""
        ends: list[float] = []

        def clock(_: StepReport) -> Literal["continue"]:
            ends.append(time.monotonic())
            return "continue"

        done = self._trainer.train(start, rows, plan, on_step=clock)
        return Trained(done.adapter, done.examples, tuple(ends))

    def loss(self, adapter: Adapter | None, rows: Sequence[Tokenised]) -> float:
        """Mean loss per label token (nats) with a global adapter; None: of the base alone."""
        return self._trainer.evaluate(adapter, rows).loss

    def empty(self) -> Adapter:
        """The global adapter of version 0: rank 0 everywhere."""
        return {name: LoraFactors.empty(*shape) for name, shape in self.shapes.items()}


@dataclass(frozen=True)
class Trained:
    """Trained factors, examples seen, and the moments (s) at which steps ended."""

    adapter: Adapter
    examples: int
    ends: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """Median seconds of a step, but for the first."""
        return float(np.median(np.diff(self.ends)))


@dataclass(frozen=True)
class Turn:
    """A device's part in a version.

    `version`: the newest one while its update is awaited; `version` + 1 is made of it. `begin`: the one that
    the device starts from.
    """

    version: int
    begin: int
    device: int


def half_stale(devices: Sequence[int], version: int) -> list[Turn]:
    """Every second device began one version before the others, as happens in a buffered federation."""
    return [Turn(version, max(0, version - place % 2), device) for place, device in enumerate(devices)]


def drawn(count: int, size: int, seed: int, version: int) -> list[int]:
    """Which `size` of `count` devices take part in a version, in an order of its own."""
    return [int(device) for device in np.random.default_rng([seed, version]).permutation(count)[:size]]


def grown(
    history: list[Version],
    last: int,
    turns: Callable[[int], Sequence[Turn]],
    train: Callable[[Turn], Sent],
    merge: Callable[[list[Sent]], Version],
) -> Iterator[tuple[int, Version]]:
    """Version after version up to number `last`: each is appended to `history`, and yielded with its number.

    Args:
        history: the versions that there are, from 0.
        last: the number of the last one to make.
        turns: who takes part while a version is the newest.
        train: what a device sends.
        merge: the next version of what was sent.
    """
    for version in range(len(history) - 1, last):
        history.append(merge([train(turn) for turn in turns(version)]))
        yield version + 1, history[-1]


def staleness_weights(turns: Sequence[Turn]) -> list[float]:
    """The engine's polynomial weights of updates of equal size; they sum to 1."""
    raw = [polynomial(turn.version - turn.begin) for turn in turns]
    return [weight / sum(raw) for weight in raw]


@dataclass(frozen=True)
class Update:
    """What a device sent: a state or a change, as the rule has it, and how many components it had carried."""

    turn: Turn
    factors: Adapter
    carry_rank: int = ALL


def merged(rule: Rule, history: Sequence[Adapter], updates: Sequence[Update]) -> tuple[Adapter, float]:
    """The next version by a rule, in memory, and the share of energy that its truncation discarded."""
    now, weights = len(history) - 1, staleness_weights([update.turn for update in updates])
    following, energy, discarded = {}, 0.0, 0.0
    for name, current in history[-1].items():
        changes, starts = [], {}
        for weight, update in zip(weights, updates, strict=True):
            begin, factors, carried = update.turn.begin, update.factors[name], update.carry_rank
            changes.append(Change(weight, factors, begin, carried))
            before = history[begin][name]
            if before.rank and rule.needs_start(factors.rank, carried, before.rank):
                starts[begin] = before
        done = rule.next(Merging(current, changes, now, starts), RANK_CAP)
        following[name] = done.factors
        energy, discarded = energy + done.energy, discarded + done.discarded_energy
    return following, discarded / energy


def plan_of(training: Training, begin: int) -> Plan:
    """A federation's training as an assignment from version `begin` has it."""
    rate = training.learning_rate_at(begin)
    return Plan(training.steps, training.batch, training.batch, training.sequence_len, rate)


def live_parts(whole: Adapter) -> Adapter:
    """All live components of a global adapter, as a device that carries everything holds them."""
    return {name: split(factors.leading(live_rank(factors)), "balanced") for name, factors in whole.items()}


def fresh_factors(shapes: Shapes, rank: int, wide: float, seed: int) -> Adapter:
    """B = 0 and A as `pad` draws it, with rows `wide` times as long."""
    fresh = {}
    for name, shape in shapes.items():
        padded = pad(LoraFactors.empty(*shape), min(rank, *shape), f"{seed}/{name}")
        fresh[name] = LoraFactors(padded.b, padded.a * np.float32(wide))
    return fresh


class Homes:
    """Smart-home households of a seed (examples/smart_home.py) as rows, and a test set of all intents.

    Args:
        base: whose tokenizer is used.
        count: how many households.
        per_intent: rows of each intent in the test set.
        seed: of both.
        length: tokens of a row, at most.
    """

    def __init__(self, base: Base, count: int, per_intent: int, seed: int, length: int) -> None:
        homes = smart_home.households(count, seed)
        self.train = [base.rows(home.train, length) for home in homes]
        self.test = base.rows(smart_home.test_set(smart_home.INTENTS, per_intent, seed), length)
