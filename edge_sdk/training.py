"""What a training run is told and what it answers; its order of data, its rests and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_sdk.core.carried import CarriedDtype
from edge_sdk.core.errors import InputError
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Directive
from edge_sdk.dataset import Tokenised

REST_SLICE_S = 0.5  # in calm mode the caller is heard at least this often


class Abandoned(Exception):
    """`on_step` answered `abandon`: the assignment is worth nothing any more. Not an error."""


@dataclass(frozen=True)
class Start:
    """What to train. Rule `flexlora`: `adapter`, trained itself. Rule `carry`: `carried` frozen (None at the
    first version) in `carried_dtype`, with fresh factors of `rank` on top. A module narrower than `rank` has
    min(out, in).
    """

    adapter: Adapter | None
    carried: Adapter | None
    rank: int
    seed: int
    carried_dtype: CarriedDtype = "float32"


@dataclass(frozen=True)
class Plan:
    """How to train. `micro_batch` and `duty` suit the device and change the result by rounding alone.

    `duty`: the share of wall time that may be spent computing; below 1 the trainer rests between steps.
    """

    steps: int
    batch: int
    micro_batch: int
    sequence_len: int
    learning_rate: float
    duty: float = 1.0
    checkpoint_s: float = 30.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.micro_batch) < 1 or not 0 < self.duty <= 1:
            raise InputError(
                f"steps {self.steps}, batch {self.batch} and micro-batch {self.micro_batch} must be at least "
                f"1, and duty {self.duty} above 0 and at most 1"
            )


@dataclass(frozen=True)
class StepReport:
    """After a step: its number (1 …), mean loss per label token, examples and computing time so far."""

    step: int
    steps: int
    loss: float
    examples: int
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The outcome. `loss_before` and `loss_after` are the training losses of the first and the last step;
    `seconds` is computing time without rests, over all parts of a resumed run.
    """

    adapter: Adapter
    steps: int
    examples: int
    loss_before: float
    loss_after: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy per label token (nats), and how many tokens that is over."""

    loss: float
    tokens: int


def batch_indices(examples: int, batch: int, step: int, seed: int) -> list[int]:
    """Which examples step `step` (from 0) takes: seeded permutations of all, cut in batches."""
    places = range(step * batch, (step + 1) * batch)
    epochs = range(places[0] // examples, places[-1] // examples + 1)
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in epochs}
    return [int(order[place // examples][place % examples]) for place in places]


def rest(until: float, report: StepReport, on_step: Callable[[StepReport], Directive]) -> Directive:
    """Report a step, then sleep until the monotonic time `until`, asking again every half second."""
    while True:
        directive = on_step(report)
        if directive == "abandon":
            raise Abandoned
        remaining = until - time.monotonic()
        if directive == "finish" or remaining <= 0 or report.step == report.steps:
            return directive
        time.sleep(min(remaining, REST_SLICE_S))
        if until - time.monotonic() <= 0:
            return directive


def identity(
    start: Start, adapter: Adapter, examples: Sequence[Tokenised], plan: Plan, scaling: float
) -> dict[str, Any]:
    """What a checkpoint must agree with: all that decides the result but how the device spreads the work."""
    settings = dataclasses.asdict(plan)
    for name in ("micro_batch", "duty", "checkpoint_s"):
        del settings[name]
    digest = hashlib.sha256()
    for part in (adapter, start.carried or {}):
        for module in sorted(part):
            digest.update(module.encode() + part[module].b.tobytes() + part[module].a.tobytes())
    for row in examples:
        digest.update(np.asarray([len(row.ids), *row.ids, *row.labels], dtype=np.int64).tobytes())
    return {
        "seed": start.seed,
        "rank": start.rank,
        "carried_dtype": start.carried_dtype if start.carried else "float32",
        "scaling": scaling,
        "content": digest.hexdigest(),
        **settings,
    }
