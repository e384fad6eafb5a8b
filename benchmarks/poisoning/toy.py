"""Poisoned updates where the right answer is known: matrix regression, the coordinator's own rules, no files.

20 devices regress on a 32 × 32 target of rank 6, each on its own noisy copy; a version merges 10 updates.
Four devices are hostile from the first version on: on average two of the ten, at most four. What is measured
is the relative error ‖G − W‖ / ‖W‖ of the global matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.merging.admission import Admission, admit, bound, measure
from coordinator.merging.robust import RobustName, gram, reweight
from coordinator.rules import RULES, Change, Merging, SumRule
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors, Matrix
from edge_sdk.core.messages import RuleName

WIDTH, TRUE_RANK, RANK, RANK_CAP = 32, 6, 6, 12
DEVICES, HOSTILE, BUFFER_SIZE, VERSIONS = 20, 4, 10, 30
DECAY, NOISE = 0.8, 0.3  # of the target's singular values; of a copy, as a share of the target's norm
STEPS, LEARNING_RATE = 15, 0.02
DIVERGED = 1e6

Attack = Literal["nobody", "flipped", "reversed", "scaled", "absent"]
TIMES: dict[Attack, float] = {"nobody": 1.0, "flipped": -1.0, "reversed": -10.0, "scaled": 100.0}
Defence = Literal["none", "bound", "norm_median", "geometric_median", "trimmed"]


@dataclass(frozen=True)
class Case:
    """A merge rule, what the hostile devices send, and what is done about it."""

    rule: RuleName
    attack: Attack
    defence: Defence

    @property
    def admission(self) -> Admission:
        """The host's settings. Without the bound no update is ever too long."""
        robust: RobustName = "none" if self.defence == "bound" else self.defence
        return Admission(
            norm_factor=5.0 if self.defence == "bound" else 1e30, robust=robust, trimmed_share=0.4
        )


def federate(case: Case, seed: int, versions: int = VERSIONS) -> float:
    """The relative error after `versions`; infinite where the global matrix is lost."""
    rng = np.random.default_rng(seed)
    wanted, copies = _target(rng)
    history, recent = [LoraFactors.empty(WIDTH, WIDTH)], list[tuple[str, float]]()
    for version in range(versions):
        devices = [int(d) for d in rng.permutation(DEVICES)[:BUFFER_SIZE]]
        if case.attack == "absent":
            devices = [d for d in devices if d >= HOSTILE]
        start = history[-1]
        sent = [_sent(case, d, start, copies[d], (seed, version)) for d in devices]
        history.append(merged(case, version, start, list(zip(devices, sent, strict=True)), recent))
        if not history[-1].norm() < DIVERGED:
            return float("inf")
    return float(np.linalg.norm(history[-1].product() - wanted) / np.linalg.norm(wanted))


def merged(
    case: Case,
    version: int,
    start: LoraFactors,
    sent: Sequence[tuple[int, LoraFactors]],
    recent: list[tuple[str, float]],
) -> LoraFactors:
    """The next global factors, as the coordinator makes them of its files; adds to the norms in `recent`."""
    rule, choices = RULES[case.rule], case.admission
    assert isinstance(rule, SumRule)
    begun = rule.serve(start, RANK, "balanced", "") if start.rank and not rule.carries else start
    norms = [measure([("w", rule.change(update, begun))]) for _, update in sent]
    recent += [(str(device), norm.total) for (device, _), norm in zip(sent, norms, strict=True)]
    limit = bound(recent[-choices.history :], choices)
    factors = [admit(norm, limit, refuse=False) for norm in norms]
    recent[-len(sent) :] = [
        (str(device), factor * norm.total)
        for (device, _), factor, norm in zip(sent, factors, norms, strict=True)
    ]
    inner = gram([rule.change(update, begun) for _, update in sent]) * np.outer(factors, factors)
    weights = np.full(len(sent), 1 / len(sent))
    found = reweight(choices.robust, inner, weights, choices.trimmed_share)
    changes = [
        rule.shorter(Change(float(w), update, version, RANK_CAP), float(f * g), begun)
        for (_, update), w, f, g in zip(sent, found.weights, factors, found.factors, strict=True)
    ]
    starts = {version: start} if start.rank and not rule.carries else {}
    return rule.next(Merging(start, changes, version, starts), RANK_CAP).factors


def _target(rng: np.random.Generator) -> tuple[Matrix, Matrix]:
    """The target, and each device's copy of it."""
    u, _ = np.linalg.qr(rng.standard_normal((WIDTH, TRUE_RANK)))
    v, _ = np.linalg.qr(rng.standard_normal((WIDTH, TRUE_RANK)))
    wanted = (u * DECAY ** np.arange(TRUE_RANK)) @ v.T
    noise = rng.standard_normal((DEVICES, WIDTH, WIDTH)) / WIDTH
    return wanted, wanted + NOISE * np.linalg.norm(wanted) * noise


def _sent(case: Case, device: int, start: LoraFactors, copy: Matrix, at: tuple[int, int]) -> LoraFactors:
    """What a device hands in: trained from the version as its rule serves it; poisoned if it is hostile."""
    rule = RULES[case.rule]
    begun = rule.serve(LoraFactors.empty(WIDTH, WIDTH) if rule.carries else start, RANK, "balanced", f"{at}")
    held = start.product() if rule.carries else np.zeros((WIDTH, WIDTH))
    end = _trained(begun, copy - held)
    if device >= HOSTILE or case.attack in ("nobody", "absent"):
        return end
    times = TIMES[case.attack]
    if rule.carries:
        return LoraFactors(np.float32(times) * end.b, end.a)
    return combine([(times, end), (1.0 - times, start.leading(RANK))], RANK).factors


def _trained(begun: LoraFactors, wanted: Matrix) -> LoraFactors:
    """STEPS steps of Adam on ½‖BA − W‖²."""
    values = [begun.b.astype(np.float64), begun.a.astype(np.float64)]
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    for step in range(1, STEPS + 1):
        residual = values[0] @ values[1] - wanted
        for i, gradient in enumerate((residual @ values[1].T, values[0].T @ residual)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            direction = (first[i] / (1 - 0.9**step)) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            values[i] = values[i] - LEARNING_RATE * direction
    return LoraFactors(values[0].astype(np.float32), values[1].astype(np.float32))
