"""A federation in one process on the embedded base: the real trainer and merge, no network, no clock.

Six smart-home households (examples/smart_home.py). Every version merges four updates, half of them from the
version before (staleness 1), as in a buffered federation; which devices these are, and which have the stale
version, follows from the seed alone, so that every choice sees the same data in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.rules import RULES, Change, Merging
from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.flexlora import live_rank, pad, serve, split
from edge_sdk.core.lora import Adapter, LoraFactors, stacked
from edge_sdk.core.messages import RuleName, Training
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, Start, StepReport
from edge_sdk.training.trainer import Trainer
from examples import smart_home

SCALING, RANK_CAP = 2.0, 32
HOUSEHOLDS, BUFFER_SIZE = 6, 4
TRAINING = Training(steps=16, batch=4, sequence_len=64, learning_rate=6e-3, learning_rate_decay=0.96)
TEST_PER_INTENT = 6

Fresh = Literal["random", "top", "warm", "some"]


@dataclass(frozen=True)
class Choice:
    """What every device does. `rank` 1 costs 16 bytes a value, a carried component what its dtype says.

    `fresh`: how the factors to train begin under `carry`. `random`: B = 0, A random. `top`: B = 0, A the
    first right singular vectors of the carried adapter. `warm`: the first components of the carried adapter
    are trained themselves, and the others carried. `some`: likewise, but a random subset of them.
    """

    rule: RuleName
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


Part = tuple[int, Choice, Start, Adapter]
"""An update: the version that it started from, what its device does, what it began with and what it sent."""


@dataclass(frozen=True)
class Outcome:
    """Held-out losses (mean over all intents, nats per token) after some versions; seconds of a step."""

    losses: dict[str, float]
    step_s: float


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        base = base_model.load("tiny", device="cpu")
        self._shapes = base_model.describe("tiny").modules
        self._trainer = Trainer(base, self._shapes, SCALING, progress=False)

    def _rows(self, records: Sequence[Mapping[str, str]]) -> list[Tokenised]:
        tokenizer = self._trainer.base.tokenizer
        return [tokenise(parse_record(dict(r)), tokenizer, TRAINING.sequence_len) for r in records]

    def run(self, choices: Sequence[Choice], seed: int, versions: int, every: int) -> Outcome:
        """Train `versions` versions, household i by `choices[i]`; held-out loss after every `every`."""
        homes = smart_home.households(HOUSEHOLDS, seed)
        data = [self._rows(home.train) for home in homes]
        held_out = self._rows(smart_home.test_set(smart_home.INTENTS, TEST_PER_INTENT, seed))
        history: list[Adapter | None] = [None]
        losses, steps_s = {}, []
        for version in range(versions):
            drawn = np.random.default_rng([seed, version])
            updates: list[Part] = []
            for place, home in enumerate(drawn.permutation(HOUSEHOLDS)[:BUFFER_SIZE]):
                begin = max(0, version - place % 2)
                choice = choices[home]
                start = self._start(choice, history[begin], seed * 10_000 + version * 10 + int(home))
                adapter, step_s = self._train(choice, start, data[home], begin)
                steps_s.append(step_s)
                updates.append((begin, choice, start, adapter))
            history.append(self._merged(history, updates))
            if (version + 1) % every == 0 or version + 1 == versions:
                losses[str(version + 1)] = self._trainer.evaluate(history[-1], held_out).loss
        return Outcome(losses, statistics.median(steps_s))

    def _train(
        self, choice: Choice, start: Start, rows: list[Tokenised], version: int
    ) -> tuple[Adapter, float]:
        """One assignment: the trained factors, and seconds of a step."""
        rate = TRAINING.learning_rate_at(version) * choice.rate
        # As many examples a version whatever the length of an assignment.
        plan = Plan(choice.steps, TRAINING.batch, TRAINING.batch, TRAINING.sequence_len, rate)
        times: list[float] = []

        def clock(_: StepReport) -> Literal["continue"]:
            times.append(time.monotonic())
            return "continue"

        done = self._trainer.train(start, rows, plan, on_step=clock)
        return done.adapter, float(np.median(np.diff(times)))

    def _start(self, choice: Choice, current: Adapter | None, seed: int) -> Start:
        """What a device begins with, as the service would hand it out."""
        whole = current or {n: LoraFactors.empty(*shape) for n, shape in self._shapes.items()}
        if choice.rule == "flexlora":
            served = {n: serve(f, min(choice.rank, *f.shape), "balanced", n) for n, f in whole.items()}
            return Start(served, None, choice.rank, seed)
        kept = {n: min(choice.carry_rank, live_rank(f)) for n, f in whole.items()}
        carried = {n: split(f.leading(kept[n]), "balanced") for n, f in whole.items()}
        fresh = self._fresh(choice, seed)
        if choice.fresh == "top":
            fresh = {n: _top(f, choice.rank) for n, f in whole.items()}
        elif choice.fresh in ("warm", "some"):
            fresh, carried = _parted(carried, choice, seed)
        return Start(fresh, carried, choice.rank, seed, choice.dtype)

    def _fresh(self, choice: Choice, seed: int) -> Adapter:
        """B = 0, A as `pad` draws it, times `wide`."""
        fresh = {}
        for name, shape in self._shapes.items():
            drawn = pad(LoraFactors.empty(*shape), min(choice.rank, *shape), f"{seed}/{name}")
            fresh[name] = LoraFactors(drawn.b, drawn.a * np.float32(choice.wide))
        return fresh

    def _merged(self, history: Sequence[Adapter | None], updates: Sequence[Part]) -> dict[str, LoraFactors]:
        """The next version, with polynomial staleness weights as in the engine."""
        now = len(history) - 1
        raw = [(1.0 + now - begin) ** -0.5 for begin, *_ in updates]
        weights = [w / sum(raw) for w in raw]
        newest, merged = history[-1], {}
        for name in self._shapes:
            changes, starts = [], {}
            for weight, (begin, choice, start, adapter) in zip(weights, updates, strict=True):
                factors = _change(choice, start, adapter, name)
                changes.append(Change(weight, factors, begin, choice.carry_rank))
                before = history[begin]
                if choice.rule == "carry" and before is not None and choice.carry_rank < before[name].rank:
                    starts[begin] = before[name]
            current = newest[name] if newest is not None else LoraFactors.empty(*self._shapes[name])
            rule = RULES[updates[0][1].rule]
            merged[name] = rule.next(Merging(current, changes, now, starts), RANK_CAP).factors
        return merged


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


def _change(choice: Choice, start: Start, adapter: Adapter, name: str) -> LoraFactors:
    """What a device changed: all of its factors, or (warm) these less the components that it began with."""
    if choice.fresh not in ("warm", "some") or start.adapter is None:
        return adapter[name]
    before, after = start.adapter[name], adapter[name]
    return stacked([(1.0, after), (-1.0, before)])


def _top(canonical: LoraFactors, rank: int) -> LoraFactors:
    """B = 0, A the first live right singular vectors; the rest is filled up at random by the trainer."""
    kept = min(rank, live_rank(canonical), *canonical.shape)
    return LoraFactors(np.zeros((canonical.shape[0], kept), np.float32), canonical.a[:kept])
