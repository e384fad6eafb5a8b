"""Poisoned updates where the right answer is known (benchmarks/common/regression.py).

20 devices regress on a 32 × 32 target of rank 6; the coordinator's own rules merge 10 updates a version. Four
devices are hostile from the first version on: on average two of the ten, at most four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from benchmarks.common.regression import Adam, Problem
from coordinator.merging.admission import Admission, admit, bound, measure
from coordinator.merging.robust import RobustName, gram, reweight
from coordinator.rules.named import rule_named
from coordinator.rules.rule import Change, Merging, SumRule
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix

WIDTH, TRUE_RANK, RANK, RANK_CAP = 32, 6, 6, 12
DEVICES, HOSTILE, BUFFER_SIZE, VERSIONS = 20, 4, 10, 30
ADAM = Adam(steps=15, learning_rate=0.02)
SETTINGS = {"adam": asdict(ADAM), "devices": DEVICES, "hostile": HOSTILE, "buffer_size": BUFFER_SIZE}
DIVERGED = 1e6

Attack = Literal["nobody", "flipped", "reversed", "scaled", "absent"]
TIMES: dict[Attack, float] = {"nobody": 1.0, "flipped": -1.0, "reversed": -10.0, "scaled": 100.0}
Defence = Literal["none", "bound", "norm_median", "geometric_median", "trimmed"]


@dataclass(frozen=True)
class Case:
    """A merge rule, what the hostile devices send, and what is done about it."""

    rule: str
    attack: Attack
    defence: Defence

    @property
    def admission(self) -> Admission:
        """The host's settings. Without the bound no update is ever too long."""
        robust: RobustName = "none" if self.defence == "bound" else self.defence
        return Admission(
            norm_factor=5.0 if self.defence == "bound" else 1e30, robust=robust, trimmed_share=0.4
        )


@dataclass
class Known:
    """What the coordinator has learnt of norms: each device's latest, and the bound.

    All of a run is within a day or so, in which a learnt bound hardly moves: it stays what it was at first.
    """

    latest: dict[int, float] = field(default_factory=dict)
    limit: float | None = None

    def bound(self, choices: Admission) -> float | None:
        """The longest change that is merged whole."""
        if self.limit is None:
            self.limit = bound(list(self.latest.values()), choices)
        return self.limit


def federate(case: Case, seed: int, versions: int = VERSIONS) -> float:
    """The relative error after `versions`; infinite where the global matrix is lost."""
    rng = np.random.default_rng(seed)
    problem = Problem.drawn(WIDTH, TRUE_RANK, DEVICES, rng)
    history, known = [LoraFactors.empty(WIDTH, WIDTH)], Known()
    for version in range(versions):
        devices = [int(d) for d in rng.permutation(DEVICES)[:BUFFER_SIZE]]
        if case.attack == "absent":
            devices = [d for d in devices if d >= HOSTILE]
        start = history[-1]
        sent = [_sent(case, d, start, problem.copies[d], (seed, version)) for d in devices]
        history.append(merged(case, version, start, list(zip(devices, sent, strict=True)), known))
        if not history[-1].norm() < DIVERGED:
            return float("inf")
    return problem.error(history[-1])


def merged(
    case: Case,
    version: int,
    start: LoraFactors,
    sent: Sequence[tuple[int, LoraFactors]],
    known: Known,
) -> LoraFactors:
    """The next global factors, as the coordinator makes them of its files; notes norms in `known`."""
    rule, choices = rule_named(case.rule), case.admission
    assert isinstance(rule, SumRule)
    begun = rule.serve(start, RANK, "balanced", "") if start.rank and not rule.carries else start
    norms = [measure([("w", rule.change(update, begun))]) for _, update in sent]
    known.latest |= {device: norm.total for (device, _), norm in zip(sent, norms, strict=True)}
    limit = known.bound(choices)
    factors = [admit(norm, limit, refuse=False) for norm in norms]
    for (device, _), factor, norm in zip(sent, factors, norms, strict=True):
        known.latest[device] = factor * norm.total
    inner = gram([rule.change(update, begun) for _, update in sent]) * np.outer(factors, factors)
    weights = np.full(len(sent), 1 / len(sent))
    found = reweight(choices.robust, inner, weights, choices.trimmed_share)
    changes = [
        rule.shorter(Change(float(w), update, version, RANK_CAP), float(f * g), begun)
        for (_, update), w, f, g in zip(sent, found.weights, factors, found.factors, strict=True)
    ]
    starts = {version: start} if start.rank and not rule.carries else {}
    return rule.next(Merging(start, changes, version, starts), RANK_CAP).factors


def _sent(case: Case, device: int, start: LoraFactors, copy: Matrix, at: tuple[int, int]) -> LoraFactors:
    """What a device hands in: trained from the version as its rule serves it; poisoned if it is hostile."""
    rule = rule_named(case.rule)
    begun = rule.serve(LoraFactors.empty(WIDTH, WIDTH) if rule.carries else start, RANK, "balanced", f"{at}")
    held = start.product() if rule.carries else np.zeros((WIDTH, WIDTH))
    end = LoraFactors(*ADAM.fit(begun.b, begun.a, copy - held))
    if device >= HOSTILE or case.attack in ("nobody", "absent"):
        return end
    times = TIMES[case.attack]
    if rule.carries:
        return LoraFactors(np.float32(times) * end.b, end.a)
    return combine([(times, end), (1.0 - times, start.leading(RANK))], RANK).factors
