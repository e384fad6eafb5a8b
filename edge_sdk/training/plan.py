"""What a training run is told and what it answers; its order of data, its rests and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_sdk.core.choice.carried import CarriedDtype
from edge_sdk.core.choice.setting import Optimizer, Ranks
from edge_sdk.core.errors import InputError
from edge_sdk.core.lora import Adapter
from edge_sdk.core.messages import Directive
from edge_sdk.core.ranges import Seconds, Several, Share, Size
from edge_sdk.text.rows import Tokenised

REST_SLICE_S = 0.5  # in calm mode the caller is heard at least this often


# What a step callback answers: the coordinator's word, or the device's own to leave off and go on later.
StepAnswer = Directive | Literal["interrupt"]


class Interrupted(Exception):
    """`on_step` answered `interrupt`: the checkpoint is written and the run can go on later. Not an error."""


class Abandoned(Exception):
    """`on_step` answered `abandon`: the assignment is worth nothing any more. Not an error."""


@dataclass(frozen=True)
class Start:
    """What to train. Rule `flexlora`: `adapter`, trained itself. Rule `carry`: `carried` frozen (None at the
    first version) in `carried_dtype`, with fresh factors of `rank` on top. A module narrower than `rank` has
    min(out, in). A number is the rank of every module.
    """

    adapter: Adapter | None
    carried: Adapter | None
    rank: int | Ranks
    seed: int
    carried_dtype: CarriedDtype = "float32"

    @property
    def ranks(self) -> Ranks:
        """The rank of each kind of module."""
        return self.rank if isinstance(self.rank, Ranks) else Ranks.uniform(self.rank)


@dataclass(frozen=True)
class Plan:
    """How to train. `micro_batch`, `checkpointing` and `duty` suit the device and change the result by
    rounding alone.

    `duty`: the share of wall time that may be spent computing; below 1 the trainer rests between steps.
    """

    steps: Several
    batch: Several
    micro_batch: Several
    sequence_len: Several
    learning_rate: Size
    duty: Share = 1.0
    checkpoint_s: Seconds = 30.0
    checkpointing: bool = False  # see core.choice.setting
    optimizer: Optimizer = "adamw"
    only_b: bool = False  # A stays as it is: it selects the columns that are trained

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.micro_batch) < 1 or not 0 < self.duty <= 1:
            raise InputError(
                f"steps {self.steps}, batch {self.batch} and micro-batch {self.micro_batch} must be at least "
                f"1, and duty {self.duty} above 0 and at most 1"
            )

    def described(self, ranks: Ranks) -> str:
        """The part that decides the memory, in words."""
        return f"rank {ranks}, {self.micro_batch} × {self.sequence_len} tokens at a time"


@dataclass(frozen=True)
class StepReport:
    """After a step: its number (1 …), mean loss per label token, examples and computing time so far.

    `trouble`: why the checkpoint or the finished adapter cannot be written at present; "" if it can.
    """

    step: int
    steps: int
    loss: float
    examples: int
    seconds: float
    trouble: str = ""


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


def rest(until: float, report: StepReport, on_step: Callable[[StepReport], StepAnswer]) -> StepAnswer:
    """Report a step, then sleep until the monotonic time `until`, asking again every half second."""
    while True:
        directive = on_step(report)
        if directive == "abandon":
            raise Abandoned
        remaining = until - time.monotonic()
        if directive in ("finish", "interrupt") or remaining <= 0 or report.step == report.steps:
            return directive
        time.sleep(min(remaining, REST_SLICE_S))
        if until - time.monotonic() <= 0:
            return directive


def identity(
    start: Start, adapter: Adapter, examples: Sequence[Tokenised], plan: Plan, scaling: float
) -> dict[str, Any]:
    """What a checkpoint is of: all that decides the result but how the device spreads the work.

    `factors` and `text` are digests of what is trained from. `origin` is the digest of every module's first
    component: of one adapter cut at several ranks, it is the same. `checkpoint.may_continue` says what must
    agree.
    """
    settings = dataclasses.asdict(plan)
    for name in ("micro_batch", "duty", "checkpoint_s", "checkpointing"):
        del settings[name]
    text = hashlib.sha256()
    for row in examples:
        text.update(np.asarray([len(row.ids), *row.ids, *row.labels], dtype=np.int64).tobytes())
    return {
        "seed": start.seed,
        "ranks": str(start.ranks),
        "carried_dtype": start.carried_dtype if start.carried else "float32",
        "scaling": scaling,
        "rows": len(examples),
        "text": text.hexdigest(),
        "factors": _digest(adapter, start.carried or {}),
        "origin": _digest(_first_components(adapter), _first_components(start.carried or {})),
        **settings,
    }


def _digest(*adapters: Adapter) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for adapter in adapters:
        for module in sorted(adapter):
            digest.update(module.encode() + adapter[module].b.tobytes() + adapter[module].a.tobytes())
    return digest.hexdigest()


def _first_components(adapter: Adapter) -> Adapter:
    return {module: factors.leading(1) for module, factors in adapter.items()}
