"""One assignment in training: its parameters, optimiser and counters, and when its checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from edge_sdk.core.errors import Unwritable
from edge_sdk.core.lora import Matrix
from edge_sdk.system.backoff import Backoff
from edge_sdk.system.out_of_memory import caught
from edge_sdk.system.terminal import logger
from edge_sdk.training import optimizers
from edge_sdk.training.checkpoint import Progress
from edge_sdk.training.plan import Plan, StepReport

log = logger(__name__)

# Adam's first steps have the full size whatever the gradient says, so they are taken small: linear over the
# first tenth of the assignment. Constant from then on: averaging over devices does what a decay would do.
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0


class Run:
    """The moving parts of one assignment: parameters, AdamW without weight decay, counters."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], plan: Plan) -> None:
        self.plan = plan
        self.progress = Progress(0, 0, 0.0, 0.0, 0.0)
        self.parameters = parameters
        self.optimizer = optimizers.build(plan.optimizer, parameters.values(), plan.learning_rate)
        self._whole = True  # False while an update is under way: parameters and moments are of two steps then

    def clip(self) -> float:
        """Clip the gradient to MAX_GRADIENT_NORM; the norm before."""
        if self.plan.only_b:
            for name, parameter in self.parameters.items():
                if name.endswith(".a"):
                    parameter.grad = None  # which the optimiser takes as: leave it alone
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM))

    def update(self) -> None:
        """One AdamW step at the learning rate of this step of the warm-up."""
        warm_up = max(1, round(WARM_UP_SHARE * self.plan.steps))
        own_step = self.progress.step - self.progress.adam_since + 1
        rate = self.plan.learning_rate * min(1.0, own_step / warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._whole = False
        self.optimizer.step()
        self._whole = True
        self.optimizer.zero_grad()

    def advance(self, loss: float, examples: int, seconds: float) -> None:
        """Count a step."""
        before = self.progress
        self.progress = Progress(
            before.step + 1,
            before.examples + examples,
            before.loss_first if before.step else loss,
            loss,
            before.seconds + seconds,
            before.adam_since,
        )

    def report(self, loss: float, trouble: str) -> StepReport:
        """What `on_step` is told."""
        done = self.progress
        return StepReport(done.step, self.plan.steps, loss, done.examples, done.seconds, trouble)

    def state(self) -> tuple[Progress, dict[str, Matrix]]:
        """Counters, and factors with their moments (none before the optimiser's first step)."""
        tensors: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            tensors[name] = np.ascontiguousarray(parameter.detach().cpu().numpy())
            for part, array in optimizers.moments(self.plan.optimizer, self.optimizer, parameter).items():
                tensors[f"{name}.{part}"] = array
        return self.progress, tensors

    def restore(self, progress: Progress, tensors: Mapping[str, Matrix]) -> None:
        """Continue from what `state` gave; without moments, Adam begins anew and so does its warm-up."""
        self.progress = progress
        kind = self.plan.optimizer
        for name, parameter in self.parameters.items():
            parameter.data.copy_(torch.from_numpy(tensors[name]))
            parts = {p: tensors[f"{name}.{p}"] for p in optimizers.MOMENTS[kind] if f"{name}.{p}" in tensors}
            if parts:
                steps = progress.step - progress.adam_since
                optimizers.restore(kind, self.optimizer, parameter, parts, steps)

    def rescue(self, schedule: CheckpointSchedule) -> None:
        """Write the last good step after memory ran out, if it is whole and there is memory for that.

        Between updates nothing changes but gradients. If an update itself failed, or there is no room for
        writing, the checkpoint before is what the run goes on from.
        """
        self.optimizer.zero_grad()
        if self._whole and self.progress.step and (failure := caught(schedule.now)):
            log.warning("no memory to write a checkpoint (%s); the one before counts", failure)


class CheckpointSchedule:
    """When one run writes its checkpoint. Where the disk is full it trains on, and tries again.

    Args:
        write: writes it; None for a run that keeps none.
        every_s: how often.

    Attributes:
        trouble: why the last attempt failed; "" if it did not.
    """

    def __init__(self, write: Callable[[], None] | None, every_s: float) -> None:
        self._write, self._every_s = write, every_s
        self._due = time.monotonic() + every_s
        self._backoff = Backoff()
        self.trouble = ""

    def if_due(self) -> None:
        """Write it if it is time."""
        if self._write and time.monotonic() >= self._due:
            self.now()

    def now(self) -> None:
        """Write it. Where that fails, the one before counts, and it is due again soon."""
        if self._write is None:
            return
        wait_s = self._every_s
        try:
            self._write()
            self.trouble = ""
            self._backoff.reset()
        except Unwritable as error:
            if not self.trouble:
                log.warning("%s; the checkpoint before counts", error)
            self.trouble = str(error)
            wait_s = self._backoff.next_s()
        self._due = time.monotonic() + wait_s
