"""The rules on real training: the embedded base in NF4, the real trainer, in one process, with no clock.

A version merges updates of four devices, half of them begun one version before (staleness 1), as in a
buffered federation. Every device takes part once before any does a second time. Who takes part when, whose
update is stale, each device's rank, the order of its rows and its fresh factors follow from the seed alone,
so that the rules of a seed can be compared pair by pair.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from benchmarks.common.clients import Clients, Task
from coordinator.rules import RULES, Change, Merging
from coordinator.rules.columns import serve_columns
from edge_sdk.core.choice.carried import held_bytes
from edge_sdk.core.flexlora import fresh_row, live_rank, split
from edge_sdk.core.lora import Adapter, LoraFactors, stacked
from edge_sdk.core.messages import RuleName
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.plan import Plan, Start, StepReport
from edge_sdk.training.trainer import FRESH_ROWS, Trainer

SCALING, RANK_CAP, BUFFER_SIZE = 2.0, 32, 4
STEPS, BATCH, SEQUENCE_LEN = 10, 4, 128
RATE_DECAY = 0.96  # from one version to the next
TRAINED_BYTES, FACTOR_BYTES = 16, 4  # a trained value: weight, gradient, two moments; a value on the wire

SPARSE_VERSIONS = 2  # of 12, that devices begin before low-rank training

Begins = Literal["given", "sparse", "fresh", "some"]


@dataclass(frozen=True)
class Way:
    """A rule, how its devices begin, and its learning rate.

    `begins`: `given`: the factors that the rule serves are trained themselves. `sparse`: likewise, but the
    first SPARSE_VERSIONS train input columns (edge_sdk.core.columns). `fresh`: B = 0 and A random on
    top of the whole global adapter, frozen in int8. `some`: r components of the global adapter drawn at
    random are trained themselves, the others are frozen in int8.
    """

    rule: RuleName
    begins: Begins
    rate: float

    @property
    def name(self) -> str:
        """For tables and files; without the rate."""
        return f"{self.rule} {self.begins}" if self.begins in ("some", "sparse") else self.rule

    def is_sparse(self, version: int) -> bool:
        """Whether devices that begin at `version` train input columns."""
        return self.begins == "sparse" and version < SPARSE_VERSIONS


Updates = list[tuple[int, Start, Adapter]]
"""The version that each device began from, what it began with and what it sent."""


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        base = base_model.load("tiny", device="cpu")
        self._shapes = base_model.describe("tiny").modules
        self._trainer = Trainer(base, self._shapes, SCALING, progress=False)

    def tokens(self, text: str) -> int:
        """How many tokens `text` has with the base's tokenizer."""
        return len(self._trainer.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def run(
        self, way: Way, ranks: Sequence[int], clients: Clients, seed: int, marks: Sequence[int]
    ) -> dict[str, Any]:
        """Train until version `marks[-1]`, device i at rank `ranks[i]`; losses after each of `marks`.

        Returns:
            `losses`: version -> group of clients -> mean of the clients' held-out losses (nats per token);
            `upload_bytes` and `download_bytes` per update (means); `memory_bytes`: the largest of a device's
            trained and carried factors; `step_s`; `energy_discarded`: share of the last merge; `seconds`.
        """
        began = time.monotonic()
        data = [self._rows(task.train) for task in clients.participants]
        groups = {"seen": clients.participants, **clients.unseen}
        history: list[Adapter | None] = [None]
        losses: dict[str, dict[str, float]] = {}
        sizes: list[dict[str, float]] = []
        discarded = 0.0
        for version in range(marks[-1]):
            updates: Updates = []
            for place, device in enumerate(turns(len(data), seed, version)):
                start_version = max(0, version - place % 2)
                own_seed = seed * 10_000_000 + version * 1_000 + device
                whole = history[start_version] or self._empty()
                if way.is_sparse(start_version):
                    start, received = _columns(whole, ranks[device], own_seed)
                else:
                    start, received = self._start(way, ranks[device], whole, own_seed)
                adapter, step_s = self._train(way, start, data[device], start_version)
                updates.append((start_version, start, adapter))
                sizes.append({**_sizes(start, received, adapter), "step_s": step_s})
            merged, discarded = self._merged(way, history, updates)
            history.append(merged)
            if version + 1 in marks:
                losses[str(version + 1)] = {g: self._loss(merged, tasks) for g, tasks in groups.items()}
        return {
            "losses": losses,
            "upload_bytes": fmean(s["upload"] for s in sizes),
            "download_bytes": fmean(s["download"] for s in sizes),
            "memory_bytes": max(s["memory"] for s in sizes),
            "step_s": median(s["step_s"] for s in sizes),
            "energy_discarded": discarded,
            "seconds": time.monotonic() - began,
        }

    def base_losses(self, clients: Clients) -> dict[str, float]:
        """Losses of the base alone, by group of clients."""
        groups = {"seen": clients.participants, **clients.unseen}
        return {group: self._loss(None, tasks) for group, tasks in groups.items()}

    def _rows(self, records: Sequence[Mapping[str, str]]) -> list[Tokenised]:
        tokenizer = self._trainer.base.tokenizer
        return [tokenise(parse_record(dict(r)), tokenizer, SEQUENCE_LEN) for r in records]

    def _loss(self, adapter: Adapter | None, tasks: Sequence[Task]) -> float:
        """Mean over tasks of the loss per label token on their held-out rows."""
        return fmean(self._trainer.evaluate(adapter, self._rows(task.test)).loss for task in tasks)

    def _train(self, way: Way, start: Start, rows: list[Tokenised], version: int) -> tuple[Adapter, float]:
        """One assignment: the trained factors, and seconds of a step."""
        times: list[float] = []

        def clock(_: StepReport) -> Literal["continue"]:
            times.append(time.monotonic())
            return "continue"

        rate, only_b = way.rate * RATE_DECAY**version, way.is_sparse(version)
        plan = Plan(STEPS, BATCH, BATCH, SEQUENCE_LEN, rate, only_b=only_b)
        done = self._trainer.train(start, rows, plan, on_step=clock)
        return done.adapter, float(np.median(np.diff(times)))

    def _empty(self) -> Adapter:
        return {name: LoraFactors.empty(*shape) for name, shape in self._shapes.items()}

    def _start(self, way: Way, rank: int, whole: Adapter, seed: int) -> tuple[Start, Adapter]:
        """What a device begins with, and what it was sent for that."""
        if way.begins in ("given", "sparse"):
            rule = RULES[way.rule]
            served = {n: rule.serve(f, min(rank, *f.shape), "balanced", n) for n, f in whole.items()}
            return Start(served, None, rank, seed), served
        live = {n: split(f.leading(live_rank(f)), "balanced") for n, f in whole.items()}
        if way.begins == "fresh":
            return Start(None, live, rank, seed, "int8"), live
        own, others = {}, {}
        for place, (name, factors) in enumerate(live.items()):
            order = np.random.default_rng([seed, place]).permutation(factors.rank)
            own[name] = _filled(_picked(factors, order[:rank]), rank, f"{seed}/{name}")
            others[name] = _picked(factors, order[rank:])
        return Start(own, others, rank, seed, "int8"), live

    def _merged(self, way: Way, history: Sequence[Adapter | None], updates: Updates) -> tuple[Adapter, float]:
        """The next version, with polynomial staleness weights as in the engine; share of energy discarded."""
        now, rule = len(history) - 1, RULES[way.rule]
        raw = [(1.0 + now - start) ** -0.5 for start, _, _ in updates]
        weights = [w / sum(raw) for w in raw]
        merged, energy, discarded = {}, 0.0, 0.0
        for name, shape in self._shapes.items():
            own = {v: a[name] for v, a in enumerate(history) if a is not None and v >= now - 1}
            changes = [
                Change(weight, _change(way, start, sent, name), version, carry_rank=min(shape))
                for weight, (version, start, sent) in zip(weights, updates, strict=True)
            ]
            needed = {
                c.version for c in changes if rule.needs_start(c.factors.rank, c.carry_rank, min(shape))
            }
            starts = {v: own[v] for v in needed if v in own}
            current = own.get(now, LoraFactors.empty(*shape))
            done = rule.next(Merging(current, changes, now, starts), RANK_CAP)
            merged[name] = done.factors
            energy, discarded = energy + done.energy, discarded + done.discarded_energy
        return merged, discarded / energy


def _columns(whole: Adapter, rank: int, seed: int) -> tuple[Start, Adapter]:
    """What a device begins with in the sparse warm-up."""
    served = {n: serve_columns(f, min(rank, *f.shape), n) for n, f in whole.items()}
    return Start(served, None, rank, seed), served


def _change(way: Way, start: Start, sent: Adapter, name: str) -> LoraFactors:
    """What a device sends; with `some`, less the components that it began with."""
    if way.begins != "some" or start.adapter is None:
        return sent[name]
    before, after = start.adapter[name], sent[name]
    return stacked([(1.0, after), (-1.0, before)])


def turns(devices: int, seed: int, version: int) -> list[int]:
    """Who takes part in `version`: shuffled rounds of all devices, cut in buffers."""
    places = range(version * BUFFER_SIZE, (version + 1) * BUFFER_SIZE)
    rounds = {p // devices for p in places}
    order = {r: np.random.default_rng([seed, r]).permutation(devices) for r in rounds}
    return [int(order[p // devices][p % devices]) for p in places]


def _picked(factors: LoraFactors, places: Sequence[int] | np.ndarray[Any, Any]) -> LoraFactors:
    kept = np.sort(np.asarray(places, int))
    return LoraFactors(factors.b[:, kept], factors.a[kept])


def _filled(factors: LoraFactors, rank: int, seed: str) -> LoraFactors:
    """Fresh components up to `rank`, with rows as long as the trainer's own."""
    out_features, in_features = factors.shape
    missing = min(rank, out_features, in_features) - factors.rank
    if missing <= 0:
        return factors
    rows = [FRESH_ROWS * fresh_row(in_features, f"{seed}/{place}") for place in range(missing)]
    b = np.concatenate([factors.b, np.zeros((out_features, missing), np.float32)], axis=1)
    return LoraFactors(b, np.concatenate([factors.a, np.stack(rows)]).astype(np.float32))


def _sizes(start: Start, received: Adapter, sent: Adapter) -> dict[str, float]:
    """Bytes that a device fetched, sent, and held for trained and carried factors."""

    def values(adapter: Adapter) -> int:
        return sum(f.b.size + f.a.size for f in adapter.values())

    carried = start.carried or {}
    return {
        "download": FACTOR_BYTES * values(received),
        "upload": FACTOR_BYTES * values(sent),
        "memory": TRAINED_BYTES * values(sent)
        + sum(held_bytes(start.carried_dtype, f.rank, *f.shape) for f in carried.values()),
    }
