"""On-device training: LoRA factors on a frozen base model, in one PEFT model that is never reloaded.

Adapters cross this boundary as `edge_sdk.core.lora.Adapter`, with the scaling folded into `b`; inside, PEFT
holds `b / s` with `lora_alpha = s·r`. Training has no randomness but the order of the data and the fresh
factors, which both follow from `Start.seed`: no dropout, and no global random state is read or set.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from edge_sdk import checkpoint as checkpoints
from edge_sdk.adapter_places import CARRIED, LOCAL, AdapterPlaces
from edge_sdk.base_model import LoadedBase
from edge_sdk.checkpoint import Progress
from edge_sdk.core.codec import Shapes
from edge_sdk.core.errors import InputError
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix
from edge_sdk.core.messages import Directive
from edge_sdk.dataset import IGNORED, Tokenised, collate, prompt_ids
from edge_sdk.training import (
    Abandoned,
    Evaluation,
    Plan,
    Start,
    StepReport,
    Trained,
    batch_indices,
    identity,
    rest,
)

__all__ = ["Abandoned", "Evaluation", "Plan", "Start", "StepReport", "Trained", "Trainer"]

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
    """

    def __init__(
        self, base: LoadedBase, shapes: Shapes, scaling: float, progress: bool | None = None
    ) -> None:
        self._base, self._shapes, self._scaling = base, dict(shapes), scaling
        self._selects_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        self._places = AdapterPlaces(base, shapes, scaling)
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
        on_step: Callable[[StepReport], Directive],
        checkpoint: Path | None = None,
    ) -> Trained:
        """Run an assignment, from `checkpoint` if that is of this very assignment.

        `on_step` is called after every step, and every half second while resting; `finish` ends the run with
        the steps done. On a CPU a resumed run gives the same bits as one that was not interrupted.

        Raises:
            Abandoned: `on_step` said so.
            InputError: no examples, rows longer than the plan or the model allows, or training that diverged.
            AdapterError: factors that do not fit the modules.
        """
        self._check_rows(examples, plan.sequence_len)
        adapter = self._starting_factors(start)
        with self._places.installed({LOCAL: adapter, CARRIED: start.carried}, start.carried_dtype):
            run = _Run(self._places.trainable(), plan)
            marks = identity(start, adapter, examples, plan, self._scaling) if checkpoint else {}
            if checkpoint and (found := checkpoints.read(checkpoint, marks)):
                run.restore(*found)
            save = (lambda: checkpoints.write(checkpoint, marks, *run.state())) if checkpoint else None
            with _bar("training", plan.steps, self._bars, run.progress.step) as bar:
                self._loop(run, _batches(examples, plan, start.seed, run.progress.step), on_step, save, bar)
            done, factors = run.progress, self._places.factors(LOCAL)
        return Trained(factors, done.step, done.examples, done.loss_first, done.loss_last, done.seconds)

    def _loop(
        self,
        run: _Run,
        batches: Iterable[Sequence[Tokenised]],
        on_step: Callable[[StepReport], Directive],
        save: Callable[[], None] | None,
        bar: Any,
    ) -> None:
        """Steps until the batches of the plan are done or the caller says finish."""
        saved_at = time.monotonic()
        for rows in batches:
            began = time.monotonic()
            loss = self._step(run, rows)
            now = time.monotonic()
            run.advance(loss, len(rows), now - began)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if save and now - saved_at >= run.plan.checkpoint_s:
                save()
                saved_at = now
            resting_until = now + (now - began) * (1 / run.plan.duty - 1)
            if rest(resting_until, run.report(loss), on_step) == "finish":
                return

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
        the prompts would be the largest tensor of the whole step.
        """
        batch = collate(rows, self._base.tokenizer.pad_token_id)
        keep = torch.from_numpy(np.flatnonzero((batch.labels[:, 1:] != IGNORED).any(axis=0)))
        targets = torch.from_numpy(batch.labels)[:, keep + 1].to(self._base.device)
        keep = keep.to(self._base.device)
        output = self._base.model(
            input_ids=torch.from_numpy(batch.ids).to(self._base.device),
            attention_mask=torch.from_numpy(batch.mask).to(self._base.device),
            use_cache=False,
            **({"logits_to_keep": keep} if self._selects_logits else {}),
        )
        logits = output.logits if self._selects_logits else output.logits[:, keep]
        counted = targets != IGNORED
        return torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")

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
                total += self._loss_sum(rows).item()
                bar.update(len(rows))
        return Evaluation(total / tokens, tokens)

    def generate(self, adapter: Adapter | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to `prompts`, in the form that training used. A long prompt loses its beginning."""
        tokenizer, answers = self._base.tokenizer, []
        room = max(1, (self._base.max_positions or sys.maxsize) - max_new_tokens)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._end_tokens(),
        )
        bar = _bar("generating", len(prompts), self._bars)
        with self._places.installed({CARRIED: adapter}), torch.no_grad(), bar:
            for begin in range(0, len(prompts), GENERATION_BATCH):
                part = prompts[begin : begin + GENERATION_BATCH]
                ids, mask = _left_padded(
                    [prompt_ids(prompt, tokenizer, room) for prompt in part], tokenizer.pad_token_id
                )
                produced = self._base.model.generate(
                    input_ids=ids.to(self._base.device),
                    attention_mask=mask.to(self._base.device),
                    generation_config=settings,
                )
                answers += tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
                bar.update(len(part))
        return answers

    def _end_tokens(self) -> list[int]:
        """Tokens that end an answer: the tokeniser's eos, and those that the model's own settings name."""
        named = self._base.model.generation_config.eos_token_id
        named = named if isinstance(named, list) else [] if named is None else [named]
        return sorted({int(self._base.tokenizer.eos_token_id), *map(int, named)})

    def _starting_factors(self, start: Start) -> Adapter:
        """The factors to train: those given, filled up to the rank, or fresh (B = 0, A from the seed)."""
        if start.rank < 1:
            raise InputError(f"rank {start.rank} is impossible; train at least rank 1")
        empty = {
            module: LoraFactors(np.zeros((out, 0), np.float32), np.zeros((0, in_), np.float32))
            for module, (out, in_) in self._shapes.items()
        }
        given = empty if start.adapter is None else start.adapter
        self._places.check(given, start.rank)
        filled = {
            module: pad(given[module], min(start.rank, *shape), f"{start.seed}/{module}")
            for module, shape in self._shapes.items()
        }
        if start.adapter is not None:
            return filled
        return {m: LoraFactors(f.b, f.a * np.float32(FRESH_ROWS)) for m, f in filled.items()}


class _Run:
    """The moving parts of one assignment: parameters, AdamW without weight decay, counters."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], plan: Plan) -> None:
        self.plan = plan
        self.progress = Progress(0, 0, 0.0, 0.0, 0.0)
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters.values(), lr=plan.learning_rate, weight_decay=0.0)

    def clip(self) -> float:
        """Clip the gradient to MAX_GRADIENT_NORM; the norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), MAX_GRADIENT_NORM))

    def update(self) -> None:
        """One AdamW step at the learning rate of this step of the warm-up."""
        warm_up = max(1, round(WARM_UP_SHARE * self.plan.steps))
        rate = self.plan.learning_rate * min(1.0, (self.progress.step + 1) / warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
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
        )

    def report(self, loss: float) -> StepReport:
        """What `on_step` is told."""
        done = self.progress
        return StepReport(done.step, self.plan.steps, loss, done.examples, done.seconds)

    def state(self) -> tuple[Progress, dict[str, Matrix]]:
        """Counters, and factors with both Adam moments."""
        tensors = {}
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            parts = {"": parameter, ".m": state["exp_avg"], ".v": state["exp_avg_sq"]}
            for suffix, tensor in parts.items():
                tensors[name + suffix] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        return self.progress, tensors

    def restore(self, progress: Progress, tensors: Mapping[str, Matrix]) -> None:
        """Continue from what `state` gave."""
        self.progress = progress
        for name, parameter in self._parameters.items():
            parts = [torch.from_numpy(tensors[name + s]).to(parameter.device) for s in ("", ".m", ".v")]
            parameter.data.copy_(parts[0])
            step = torch.tensor(float(progress.step))
            self._optimizer.state[parameter] = {"step": step, "exp_avg": parts[1], "exp_avg_sq": parts[2]}


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


def _left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts aligned at their end, and the mask of their tokens; both (rows, longest)."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
