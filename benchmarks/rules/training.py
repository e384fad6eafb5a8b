"""The rules on real training: the embedded base in NF4, the real trainer, in one process, with no clock.

A version merges updates of four devices, half of them begun one version before (staleness 1), as in a
buffered federation. Every device takes part once before any does a second time. Who takes part when, whose
update is stale, each device's rank, the order of its rows and its fresh factors follow from the seed alone,
so that the rules of a seed can be compared pair by pair.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from benchmarks.common.clients import Clients
from benchmarks.common.federation import (
    RANK_CAP,
    Base,
    Turn,
    Update,
    grown,
    half_stale,
    live_parts,
    merged,
)
from coordinator.rules.columns import serve_columns
from coordinator.rules.named import rule_named
from edge_sdk.core.choice.carried import held_bytes
from edge_sdk.core.flexlora import FRESH_ROWS, fresh_row
from edge_sdk.core.lora import Adapter, LoraFactors, stacked
from edge_sdk.training.plan import Plan, Start

BUFFER_SIZE = 4
STEPS, BATCH, SEQUENCE_LEN = 10, 4, 128
RATE_DECAY = 0.96  # from one version to the next
TRAINED_BYTES, FACTOR_BYTES = 16, 4  # a trained value: weight, gradient, two moments; a value on the wire

SETTINGS = {
    "steps": STEPS,
    "batch": BATCH,
    "sequence_len": SEQUENCE_LEN,
    "rate_decay": RATE_DECAY,
    "buffer_size": BUFFER_SIZE,
    "rank_cap": RANK_CAP,
}
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

    rule: str
    begins: Begins
    rate: float

    @property
    def name(self) -> str:
        """For tables and files; without the rate."""
        return f"{self.rule} {self.begins}" if self.begins in ("some", "sparse") else self.rule

    def is_sparse(self, version: int) -> bool:
        """Whether devices that begin at `version` train input columns."""
        return self.begins == "sparse" and version < SPARSE_VERSIONS


class Federation:
    """One base, loaded once; `run` trains a federation on it."""

    def __init__(self) -> None:
        self.base = Base()

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
        data = [self.base.rows(task.train, SEQUENCE_LEN) for task in clients.participants]
        sizes: list[dict[str, float]] = []
        discarded: list[float] = []
        history: list[Adapter] = [self.base.empty()]

        def train(turn: Turn) -> Update:
            own_seed = seed * 10_000_000 + turn.version * 1_000 + turn.device
            start, received = _start(way, ranks[turn.device], history[turn.begin], turn.begin, own_seed)
            done = self.base.train(start, data[turn.device], _plan(way, turn.begin))
            sizes.append({**_sizes(start, received, done.adapter), "step_s": done.step_s})
            return Update(turn, _changes(way, start, done.adapter))

        def merge(updates: list[Update]) -> Adapter:
            newest, share = merged(rule_named(way.rule), history, updates)
            discarded.append(share)
            return newest

        def taking_part(version: int) -> list[Turn]:
            return half_stale(turns(len(data), seed, version), version)

        losses = {
            str(number): self.losses(adapter, clients)
            for number, adapter in grown(history, marks[-1], taking_part, train, merge)
            if number in marks
        }
        return {
            "losses": losses,
            "upload_bytes": fmean(s["upload"] for s in sizes),
            "download_bytes": fmean(s["download"] for s in sizes),
            "memory_bytes": max(s["memory"] for s in sizes),
            "step_s": median(s["step_s"] for s in sizes),
            "energy_discarded": discarded[-1],
            "seconds": time.monotonic() - began,
        }

    def losses(self, adapter: Adapter | None, clients: Clients) -> dict[str, float]:
        """By group of clients, with a global adapter or (None) of the base alone: means over the clients of
        the loss per label token on their held-out rows.
        """
        groups = {"seen": clients.participants, **clients.unseen}
        return {
            group: fmean(self.base.loss(adapter, self.base.rows(task.test, SEQUENCE_LEN)) for task in tasks)
            for group, tasks in groups.items()
        }


def _plan(way: Way, begin: int) -> Plan:
    """An assignment from version `begin`."""
    rate, only_b = way.rate * RATE_DECAY**begin, way.is_sparse(begin)
    return Plan(STEPS, BATCH, BATCH, SEQUENCE_LEN, rate, only_b=only_b)


def _start(way: Way, rank: int, whole: Adapter, begin: int, seed: int) -> tuple[Start, Adapter]:
    """What a device begins with at version `begin`, and what it was sent for that."""
    if way.is_sparse(begin):
        return _columns(whole, rank, seed)
    if way.begins in ("given", "sparse"):
        rule = rule_named(way.rule)
        served = {n: rule.serve(f, min(rank, *f.shape), "balanced", n) for n, f in whole.items()}
        return Start(served, None, rank, seed), served
    live = live_parts(whole)
    if way.begins == "fresh":
        return Start(None, live, rank, seed, "int8"), live
    own, others = {}, {}
    for place, (name, factors) in enumerate(live.items()):
        order = np.random.default_rng([seed, place]).permutation(factors.rank)
        own[name] = _filled(_picked(factors, order[:rank]), rank, f"{seed}/{name}")
        others[name] = _picked(factors, order[rank:])
    return Start(own, others, rank, seed, "int8"), live


def _columns(whole: Adapter, rank: int, seed: int) -> tuple[Start, Adapter]:
    """What a device begins with in the sparse warm-up."""
    served = {n: serve_columns(f, min(rank, *f.shape), n) for n, f in whole.items()}
    return Start(served, None, rank, seed), served


def _changes(way: Way, start: Start, sent: Adapter) -> Adapter:
    """What a device sends; with `some`, less the components that it began with."""
    if way.begins != "some" or start.adapter is None:
        return sent
    begun = start.adapter
    return {name: stacked([(1.0, after), (-1.0, begun[name])]) for name, after in sent.items()}


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
