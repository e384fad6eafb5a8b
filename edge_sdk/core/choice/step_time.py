"""How long a training step takes, as a function of rank and of everything else in a Setting.

seconds = W · a + F · b + T · c + C · d + L · e + M · f

`W` counts how often the weights of a block are read (each micro-batch dequantises every layer anew, and pays
for its calls), `F` floating-point operations in frozen matrices and attention, `T` those in trained factors,
`C` those in carried ones, `L` the logits, and `M` the micro-batches,
each of which pays for calls outside the blocks. Thin matrices are slower by the operation than wide ones. The
constants are fitted to short measurements on the machine itself (`edge_sdk.trials.step_times_child`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from edge_sdk.core.choice.model_facts import ModelFacts
from edge_sdk.core.choice.setting import Setting
from edge_sdk.core.errors import InputError

LEAST_MEASUREMENTS = 3
FROZEN, TRAINED, CARRIED = 1, 2, 3  # places of these in Work and StepTime


@dataclass(frozen=True)
class Work:
    """What a step consists of. `layer_passes`: forward-and-backward passes through one block, by micro-batch;
    gflops are 10⁹ operations; `mega_logits` are 10⁶ logits.
    """

    layer_passes: float
    frozen_gflops: float = 0.0
    trained_gflops: float = 0.0
    carried_gflops: float = 0.0
    mega_logits: float = 0.0
    micro_batches: float = 0.0


def work(facts: ModelFacts, setting: Setting, batch: int) -> Work:
    """The work of one optimiser step over `batch` examples of the setting's whole sequence length.

    A product of (m, k) and (k, n) is 2·m·k·n operations. Frozen matrices: the forward pass and the gradient
    of their input; trained factors: that of the factor as well; recomputation: the forward pass again.
    The attention itself is causal: half of (length × length) scores, twice, and 2.5 times that backwards
    (Dao et al. 2022, arXiv:2205.14135, appendix B). Every position counts as one with a label.
    """
    tokens = batch * setting.sequence_len
    again = 1 if setting.checkpointing else 0
    linear = 2 * facts.linear_parameters * (2 + again)
    scores = 2 * facts.layers * setting.sequence_len * facts.query_width * (1 + 2.5 + again)
    trained = 2 * facts.adapter_values(setting.ranks) * (3 + again)
    carried = 2 * facts.adapter_values(setting.carry_rank) * (2 + again)
    micro_batches = ceil(batch / setting.micro_batch)
    return Work(
        layer_passes=micro_batches * facts.layers * (2 + again) / 2,
        frozen_gflops=tokens * (linear + scores) / 1e9,
        trained_gflops=tokens * trained / 1e9,
        carried_gflops=tokens * carried / 1e9,
        mega_logits=tokens * facts.vocab / 1e6,
        micro_batches=micro_batches,
    )


@dataclass(frozen=True)
class StepTime:
    """The fitted constants, in seconds by unit of `Work`, field by field."""

    per_layer_pass_s: float
    per_frozen_gflop_s: float
    per_trained_gflop_s: float
    per_carried_gflop_s: float
    per_mega_logit_s: float
    per_micro_batch_s: float = 0.0

    def step_s(self, facts: ModelFacts, setting: Setting, batch: int) -> float:
        """Seconds of one optimiser step."""
        done = astuple(work(facts, setting, batch))
        return float(np.dot(done, astuple(self)))


def fit(measured: Sequence[tuple[Work, float]]) -> StepTime:
    """Constants from (work, seconds) pairs, by non-negative least squares on relative errors.

    An operation in a thin factor is never taken for faster than one in a wide matrix: where noise hides what
    ranks cost, that is the least they can.

    A kind of work that nothing measured did gets the constant 0, but carried factors, which then count as
    trained ones do.

    Raises:
        InputError: fewer than three measurements, or a time that is no positive number.
    """
    if len(measured) < LEAST_MEASUREMENTS or any(not 0 < seconds < float("inf") for _, seconds in measured):
        raise InputError("the calibration of step times needs three measured steps of positive time")
    rows = np.array([astuple(done) for done, _ in measured])
    seconds = np.array([s for _, s in measured])
    rows[:, FROZEN] += rows[:, TRAINED] + rows[:, CARRIED]  # the other two columns: what they cost on top
    found = _non_negative(rows / seconds[:, None], np.ones(len(measured)))
    for factors in (TRAINED, CARRIED):
        found[factors] += found[FROZEN]
    if not rows[:, CARRIED].any():
        found[CARRIED] = found[TRAINED]
    return StepTime(*found)


def _non_negative(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> list[float]:
    """The x ≥ 0 that minimises ‖rows·x − wanted‖: the best solution over all subsets of the columns."""
    width = rows.shape[1]
    best, found = np.inf, np.zeros(width)
    for taken in product((False, True), repeat=width):
        columns = [i for i in range(width) if taken[i] and rows[:, i].any()]
        if not columns:
            continue
        x = np.zeros(width)
        x[columns] = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
        residual = float(np.linalg.norm(rows @ x - wanted))
        if (x >= 0).all() and residual < best - 1e-12:
            best, found = residual, x
    return [float(value) for value in found]
