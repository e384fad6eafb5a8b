"""How long a training step takes, as a function of rank and of everything else in a Setting.

seconds = passes · layers · a + W · b + F · c

`passes` is how many micro-batches make the step (each dequantises every layer anew, and pays for its calls),
`W` the floating-point operations in frozen matrices, `F` those in LoRA factors, which are thin and therefore
slower by the operation. a, b and c are fitted to short measurements on the machine itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from edge_sdk.core.errors import InputError
from edge_sdk.core.facts import ModelFacts
from edge_sdk.core.setting import Setting


@dataclass(frozen=True)
class Work:
    """What a step consists of. `layer_passes`: blocks, times the micro-batches; operations are counts."""

    layer_passes: float
    frozen_operations: float
    factor_operations: float


def work(facts: ModelFacts, setting: Setting, batch: int) -> Work:
    """The work of one optimiser step over `batch` examples of the setting's whole sequence length.

    A product of (m, k) and (k, n) is 2·m·k·n operations. Frozen matrices: the forward pass and the gradient
    of their input; trained factors: that of the factor as well; recomputation: the forward pass again.
    The attention itself is causal: half of (length × length) scores, twice, and 2.5 times that backwards
    (Dao et al. 2022, arXiv:2205.14135, appendix B).
    """
    tokens = batch * setting.sequence_len
    again = 1 if setting.checkpointing else 0
    linear = 2 * facts.linear_parameters * (2 + again)
    head = 2 * facts.vocab * facts.hidden * 2
    scores = 2 * facts.layers * setting.sequence_len * facts.query_width * (1 + 2.5 + again)
    trained = 2 * facts.adapter_values(setting.ranks) * (3 + again)
    carried = 2 * facts.adapter_values(setting.carry_rank) * (2 + again)
    return Work(
        layer_passes=ceil(batch / setting.micro_batch) * facts.layers,
        frozen_operations=float(tokens * (linear + head + scores)),
        factor_operations=float(tokens * (trained + carried)),
    )


@dataclass(frozen=True)
class StepTime:
    """The fitted constants, in seconds: by layer and micro-batch, and by 10⁹ operations."""

    per_layer_s: float
    per_frozen_gflop_s: float
    per_factor_gflop_s: float

    def step_s(self, facts: ModelFacts, setting: Setting, batch: int) -> float:
        """Seconds of one optimiser step."""
        done = work(facts, setting, batch)
        return (
            done.layer_passes * self.per_layer_s
            + done.frozen_operations * self.per_frozen_gflop_s / 1e9
            + done.factor_operations * self.per_factor_gflop_s / 1e9
        )


def fit(measured: Sequence[tuple[Work, float]]) -> StepTime:
    """Constants from (work, seconds) pairs, by non-negative least squares on relative errors.

    Raises:
        InputError: fewer than three measurements, or a time that is no positive number.
    """
    if len(measured) < 3 or any(not 0 < seconds < float("inf") for _, seconds in measured):
        raise InputError("the calibration of step times needs three measured steps of positive time")
    rows = np.array(
        [[w.layer_passes, w.frozen_operations / 1e9, w.factor_operations / 1e9] for w, _ in measured]
    )
    seconds = np.array([s for _, s in measured])
    return StepTime(*_non_negative(rows / seconds[:, None], np.ones(len(measured))))


def _non_negative(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[float, float, float]:
    """The x ≥ 0 that minimises ‖rows·x − wanted‖: the best solution over all subsets of the columns."""
    best, found = np.inf, np.zeros(3)
    for mask in range(1, 8):
        columns = [i for i in range(3) if mask >> i & 1]
        x = np.zeros(3)
        x[columns] = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
        residual = float(np.linalg.norm(rows @ x - wanted))
        if (x >= 0).all() and residual < best - 1e-12:
            best, found = residual, x
    return float(found[0]), float(found[1]), float(found[2])
