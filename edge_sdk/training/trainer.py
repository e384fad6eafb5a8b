"""On-device training: LoRA factors on a frozen base model, in one PEFT model that is never reloaded.

Adapters cross this boundary as `edge_sdk.core.lora.Adapter`, with the scaling folded into `b`; inside, PEFT
holds `b / s` with `lora_alpha = s·r`. Training has no randomness but the order of the data and the fresh
factors, which both follow from `Start.seed`: no dropout, and no global random state is read or set.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from edge_sdk.core.adapter_file.codec import Shapes
from edge_sdk.core.errors import InputError, OutOfMemory
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix
from edge_sdk.model.base_model import LoadedBase
from edge_sdk.model.generation import OnText, answers
from edge_sdk.system.out_of_memory import caught, out_of_memory
from edge_sdk.text.rows import IGNORED, Tokenised, collate
from edge_sdk.training import checkpoint as checkpoints
from edge_sdk.training import optimizers
from edge_sdk.training.adapter_places import CARRIED, LOCAL, AdapterPlaces
from edge_sdk.training.checkpoint import Progress, may_continue, refitted
from edge_sdk.training.fair_lock import Turns
from edge_sdk.training.loss import summed_cross_entropy
from edge_sdk.training.plan import (
    Abandoned,
    Evaluation,
    Interrupted,
    Plan,
    Start,
    StepAnswer,
    StepReport,
    Trained,
    batch_indices,
    identity,
    rest,
)
from edge_sdk.training.recompute import recomputed, tight_heap
from edge_sdk.training.run import Keeping

__all__ = ["Abandoned", "Evaluation", "Interrupted", "Plan", "Start", "StepReport", "Trained", "Trainer"]

log = logging.getLogger(__name__)

# Adam's first steps have the full size whatever the gradient says, so they are taken small: linear over the
# first tenth of the assignment. Constant from then on: averaging over devices does what a decay would do.
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0

# Fresh factors begin with rows of A so many times as long as peft draws them (±1/√in, so of norm 0.58).
# Adam's steps on B have one size whatever the gradient, and what they change is that times A: an assignment
# is too short for fresh factors to get as far as trained ones, whose rows have grown. See docs/CARRY.md.
FRESH_ROWS = 4.0
GENERATION_BATCH = 16


class Trainer:
    """Trains, evaluates and asks one base model. It takes `base.model` over: one trainer per loaded base.

    Args:
        base: the frozen model.
        shapes: target module -> (out, in).
        scaling: s, the same at every rank.
        progress: show bars on stderr; None shows them when stderr is a terminal.
        turns: training steps and answers to people take turns, one step at a time.
    """

    def __init__(
        self,
        base: LoadedBase,
        shapes: Shapes,
        scaling: float,
        progress: bool | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._base, self._shapes, self._scaling = base, dict(shapes), scaling
        self._selects_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        self._turns = turns or Turns()
        self._places = AdapterPlaces(base, shapes, scaling, self._turns)
        self._bars = sys.stderr.isatty() if progress is None else progress

    @property
    def base(self) -> LoadedBase:
        """The base model that was taken over."""
        return self._base

    # --- training ----------------------------------------------------------------------------

    def train(
        self,
        start: Start,
        examples: Sequence[Tokenised],
        plan: Plan,
        *,
        on_step: Callable[[StepReport], StepAnswer],
        checkpoint: Path | None = None,
    ) -> Trained:
        """Run an assignment, from `checkpoint` if that is of this assignment at this setting or a larger.

        `on_step` is called after every step, and every half second while resting; `finish` ends the run with
        the steps done, `interrupt` writes the checkpoint and ends it for now, unless that was the last step.
        On a CPU a resumed run gives the same bits as one that was not interrupted.

        Raises:
            Abandoned, Interrupted: `on_step` said so.
            InputError: no examples, rows longer than the plan or the model allows, or training that diverged.
            AdapterError: factors that do not fit the modules.
            OutOfMemory: the checkpoint holds the last good step, and all that the run held is free again.
        """
        self._check_rows(examples, plan.sequence_len)
        done = self._train(start, examples, plan, on_step, checkpoint)
        if isinstance(done, OutOfMemory):
            raise done
        return done

    def _train(
        self,
        start: Start,
        examples: Sequence[Tokenised],
        plan: Plan,
        on_step: Callable[[StepReport], StepAnswer],
        checkpoint: Path | None,
    ) -> Trained | OutOfMemory:
        """The outcome. It is returned whatever it is: an error raised here would hold on to the run."""
        adapter = self._starting_factors(start)
        places = self._places.installed({LOCAL: adapter, CARRIED: start.carried}, start.carried_dtype)
        tight = tight_heap(plan.checkpointing)
        with places, tight, recomputed(self._base.model, plan.checkpointing):
            run = _Run(self._places.trainable(), plan)
            marks = identity(start, adapter, examples, plan, self._scaling) if checkpoint else {}
            accepts = functools.partial(may_continue, wanted=marks)
            if checkpoint and (kept := checkpoints.read(checkpoint, accepts)):
                run.restore(*refitted(kept, marks, adapter))
            save = (lambda: checkpoints.write(checkpoint, marks, *run.state())) if checkpoint else None
            keeping = Keeping(save, plan.checkpoint_s)
            with _bar("training", plan.steps, self._bars, run.progress.step) as bar:
                batches = _batches(examples, plan, start.seed, run.progress.step)
                failure = caught(lambda: self._loop(run, batches, on_step, keeping, bar))
            if failure:
                run.rescue(keeping)
                return out_of_memory(run.progress.step, plan.described(start.ranks), failure)
            done, factors = run.progress, self._places.factors(LOCAL)
        return Trained(factors, done.step, done.examples, done.loss_first, done.loss_last, done.seconds)

    def _loop(
        self,
        run: _Run,
        batches: Iterable[Sequence[Tokenised]],
        on_step: Callable[[StepReport], StepAnswer],
        keeping: Keeping,
        bar: Any,
    ) -> None:
        """Steps until the batches of the plan are done or the caller says finish."""
        for rows in batches:
            began = time.monotonic()
            with self._turns:
                loss = self._step(run, rows)
            now = time.monotonic()
            run.advance(loss, len(rows), now - began)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            keeping.if_due()
            resting_until = now + (now - began) * (1 / run.plan.duty - 1)
            answer = rest(resting_until, run.report(loss, keeping.trouble), on_step)
            if answer == "finish":
                return
            if answer == "interrupt" and run.progress.step < run.plan.steps:
                keeping.now()
                raise Interrupted

    def _step(self, run: _Run, rows: Sequence[Tokenised]) -> float:
        """One optimiser step on `rows`; the mean loss per label token before it.

        Micro-batches add up loss sums over one common divisor, so that they are one big batch exactly.
        """
        tokens = sum(row.label_tokens for row in rows)
        ordered = sorted(rows, key=lambda row: len(row.ids))  # rows of like length pad least
        loss = 0.0
        for begin in range(0, len(ordered), run.plan.micro_batch):
            part = self._loss_sum(ordered[begin : begin + run.plan.micro_batch]) / tokens
            part.backward()
            loss += part.item()
        norm = run.clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"training diverged at step {run.progress.step + 1} (loss {loss:.3g}, gradient "
                f"norm {norm:.3g}); lower the learning rate, now {run.plan.learning_rate:g}"
            )
        run.update()
        return loss

    def _loss_sum(self, rows: Sequence[Tokenised]) -> torch.Tensor:
        """Σ of cross-entropies over the label tokens of `rows`, float32.

        The head runs only on positions where some row has a label: with a large vocabulary the logits of
        the prompts would be the largest tensor of the whole step. There is no attention mask: rows are padded
        at their end, where causal attention sees nothing that a label depends on, and a mask would make every
        block keep a (rows, length, length) copy of it.
        """
        batch = collate(rows, self._base.tokenizer.pad_token_id)
        keep = torch.from_numpy(np.flatnonzero((batch.labels[:, 1:] != IGNORED).any(axis=0)))
        targets = torch.from_numpy(batch.labels)[:, keep + 1].to(self._base.device)
        keep = keep.to(self._base.device)
        output = self._base.model(
            input_ids=torch.from_numpy(batch.ids).to(self._base.device),
            use_cache=False,
            **({"logits_to_keep": keep} if self._selects_logits else {}),
        )
        logits = output.logits if self._selects_logits else output.logits[:, keep]
        return summed_cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _check_rows(self, rows: Sequence[Tokenised], sequence_len: int | None = None) -> None:
        """Refuse rows that the plan or the model has no place for."""
        if not rows:
            raise InputError("there are no examples to train on or to evaluate")
        longest = max(len(row.ids) for row in rows)
        limit = min(sequence_len or longest, self._base.max_positions or longest)
        if longest > limit:
            raise InputError(f"a row has {longest} tokens, more than {limit}; lower sequence_len to that")

    # --- asking ------------------------------------------------------------------------------

    def evaluate(self, adapter: Adapter | None, examples: Sequence[Tokenised], batch: int = 16) -> Evaluation:
        """Mean loss per label token of the base with `adapter` (None: the base alone)."""
        self._check_rows(examples)
        ordered = sorted(examples, key=lambda row: len(row.ids))
        tokens = sum(row.label_tokens for row in ordered)
        total = 0.0
        bar = _bar("evaluating", len(ordered), self._bars)
        with self._places.installed({CARRIED: adapter}), torch.no_grad(), bar:
            for begin in range(0, len(ordered), batch):
                rows = ordered[begin : begin + batch]
                with self._turns:
                    total += self._loss_sum(rows).item()
                bar.update(len(rows))
        return Evaluation(total / tokens, tokens)

    def generate(self, adapter: Adapter | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to `prompts`, in the form that training used. A long prompt loses its beginning."""
        said: list[str] = []
        bar = _bar("generating", len(prompts), self._bars)
        with self._places.installed({CARRIED: adapter}), bar:
            for begin in range(0, len(prompts), GENERATION_BATCH):
                part = prompts[begin : begin + GENERATION_BATCH]
                with self._turns:
                    said += answers(self._base, part, max_new_tokens)
                bar.update(len(part))
        return said

    def serve(self, adapter: Adapter | None) -> None:
        """Put the adapter that `answer` uses in place (None: the base alone), between two training steps."""
        self._places.serve(adapter)

    def serving(self) -> AbstractContextManager[None]:
        """A turn in which `answer` may be called; training goes on after it as if nothing had been."""
        return self._places.serving()

    def answer(self, prompt: str, max_new_tokens: int, on_text: OnText | None = None) -> str:
        """Greedy answer of the base with the served adapter, within `serving`.

        `on_text` hears the answer in pieces, word by word, while it is made.
        """
        return answers(self._base, [prompt], max_new_tokens, on_text)[0]

    def _starting_factors(self, start: Start) -> Adapter:
        """The factors to train: those given, filled up to the rank, or fresh (B = 0, A from the seed)."""
        ranks = {module: min(start.ranks.of(module), *shape) for module, shape in self._shapes.items()}
        empty = {
            module: LoraFactors(np.zeros((out, 0), np.float32), np.zeros((0, in_), np.float32))
            for module, (out, in_) in self._shapes.items()
        }
        given = empty if start.adapter is None else start.adapter
        self._places.check(given, ranks)
        filled = {m: pad(given[m], rank, f"{start.seed}/{m}") for m, rank in ranks.items()}
        if start.adapter is not None:
            return filled
        return {m: LoraFactors(f.b, f.a * np.float32(FRESH_ROWS)) for m, f in filled.items()}


class _Run:
    """The moving parts of one assignment: parameters, AdamW without weight decay, counters."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], plan: Plan) -> None:
        self.plan = plan
        self.progress = Progress(0, 0, 0.0, 0.0, 0.0)
        self._parameters = parameters
        self._optimizer = optimizers.build(plan.optimizer, parameters.values(), plan.learning_rate)
        self._whole = True  # False while an update is under way: parameters and moments are of two steps then

    def clip(self) -> float:
        """Clip the gradient to MAX_GRADIENT_NORM; the norm before."""
        if self.plan.only_b:
            for name, parameter in self._parameters.items():
                if name.endswith(".a"):
                    parameter.grad = None  # which the optimiser takes as: leave it alone
        return float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), MAX_GRADIENT_NORM))

    def update(self) -> None:
        """One AdamW step at the learning rate of this step of the warm-up."""
        warm_up = max(1, round(WARM_UP_SHARE * self.plan.steps))
        own_step = self.progress.step - self.progress.adam_since + 1
        rate = self.plan.learning_rate * min(1.0, own_step / warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._whole = False
        self._optimizer.step()
        self._whole = True
        self._optimizer.zero_grad()

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
        for name, parameter in self._parameters.items():
            tensors[name] = np.ascontiguousarray(parameter.detach().cpu().numpy())
            for part, array in optimizers.moments(self.plan.optimizer, self._optimizer, parameter).items():
                tensors[f"{name}.{part}"] = array
        return self.progress, tensors

    def restore(self, progress: Progress, tensors: Mapping[str, Matrix]) -> None:
        """Continue from what `state` gave; without moments, Adam begins anew and so does its warm-up."""
        self.progress = progress
        kind = self.plan.optimizer
        for name, parameter in self._parameters.items():
            parameter.data.copy_(torch.from_numpy(tensors[name]))
            parts = {p: tensors[f"{name}.{p}"] for p in optimizers.MOMENTS[kind] if f"{name}.{p}" in tensors}
            if parts:
                steps = progress.step - progress.adam_since
                optimizers.restore(kind, self._optimizer, parameter, parts, steps)

    def rescue(self, keeping: Keeping) -> None:
        """Write the last good step after memory ran out, if it is whole and there is memory for that.

        Between updates nothing changes but gradients. If an update itself failed, or there is no room for
        writing, the checkpoint before is what the run goes on from.
        """
        self._optimizer.zero_grad()
        if self._whole and self.progress.step and (failure := caught(keeping.now)):
            log.warning("no memory to write a checkpoint (%s); the one before counts", failure)


def _batches(
    examples: Sequence[Tokenised], plan: Plan, seed: int, first_step: int
) -> Iterator[Sequence[Tokenised]]:
    """The rows of each step from `first_step` on."""
    for step in range(first_step, plan.steps):
        yield [examples[index] for index in batch_indices(len(examples), plan.batch, step, seed)]


def _bar(label: str, total: int, shown: bool, initial: int = 0) -> Any:
    """A progress bar on stderr that appears after a second."""
    return tqdm(
        desc=label, total=total, initial=initial, delay=1.0, disable=not shown, leave=False, file=sys.stderr
    )
