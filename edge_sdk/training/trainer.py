"""On-device training: LoRA factors on a frozen base model, in one PEFT model that is never reloaded.

Adapters cross this boundary as `edge_sdk.core.lora.Adapter`, with the scaling folded into `b`; inside, PEFT
holds `b / s` with `lora_alpha = s·r`. Training has no randomness but the order of the data and the fresh
factors, which both follow from `Start.seed`: no dropout, and no global random state is read or set.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from edge_sdk.core.adapter_file.codec import Shapes
from edge_sdk.core.errors import InputError, OutOfMemory
from edge_sdk.core.flexlora import FRESH_ROWS, pad
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.model.base_model import LoadedBase
from edge_sdk.model.generation import OnText, answers
from edge_sdk.system.out_of_memory import caught, out_of_memory
from edge_sdk.text.rows import IGNORED, Tokenised, collate
from edge_sdk.training.adapter_places import CARRIED, LOCAL, AdapterPlaces
from edge_sdk.training.checkpoint import may_continue, read_checkpoint, refitted, write_checkpoint
from edge_sdk.training.fair_lock import FairLock
from edge_sdk.training.loss import summed_cross_entropy
from edge_sdk.training.plan import (
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
from edge_sdk.training.run import CheckpointSchedule, Run

GENERATION_BATCH = 16


class Trainer:
    """Trains, evaluates and asks one base model. It takes `base.model` over: one trainer per loaded base.

    Args:
        base: the frozen model.
        shapes: target module -> (out, in).
        scaling: s, the same at every rank.
        progress: show bars on stderr; None shows them when stderr is a terminal.
        lock: held for one training step or one answer at a time, so that both take turns.

    Attributes:
        base: the base model that was taken over.
        shapes: target module -> (out, in).
        places: where adapters are put in, together with the base they change what `loss_sum` gives.
        lock: who else uses the base takes it.
    """

    def __init__(
        self,
        base: LoadedBase,
        shapes: Shapes,
        scaling: float,
        progress: bool | None = None,
        lock: FairLock | None = None,
    ) -> None:
        self.base, self.shapes, self._scaling = base, dict(shapes), scaling
        self._selects_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        self.lock = lock or FairLock()
        self.places = AdapterPlaces(base, shapes, scaling, self.lock)
        self._bars = sys.stderr.isatty() if progress is None else progress

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
        adapter = self.starting_factors(start)
        places = self.places.installed({LOCAL: adapter, CARRIED: start.carried}, start.carried_dtype)
        tight = tight_heap(plan.checkpointing)
        with places, tight, recomputed(self.base.model, plan.checkpointing):
            run = Run(self.places.trainable(), plan)
            marks = identity(start, adapter, examples, plan, self._scaling) if checkpoint else {}
            accepts = functools.partial(may_continue, wanted=marks)
            if checkpoint and (kept := read_checkpoint(checkpoint, accepts)):
                run.restore(*refitted(kept, marks, adapter))
            save = (lambda: write_checkpoint(checkpoint, marks, *run.state())) if checkpoint else None
            schedule = CheckpointSchedule(save, plan.checkpoint_s)
            with _bar("training", plan.steps, self._bars, run.progress.step) as bar:
                batches = _batches(examples, plan, start.seed, run.progress.step)
                failure = caught(lambda: self._loop(run, batches, on_step, schedule, bar))
            if failure:
                run.rescue(schedule)
                return out_of_memory(run.progress.step, plan.described(start.ranks), failure)
            done, factors = run.progress, self.places.factors(LOCAL)
        return Trained(factors, done.step, done.examples, done.loss_first, done.loss_last, done.seconds)

    def _loop(
        self,
        run: Run,
        batches: Iterable[Sequence[Tokenised]],
        on_step: Callable[[StepReport], StepAnswer],
        schedule: CheckpointSchedule,
        bar: Any,
    ) -> None:
        """Steps until the batches of the plan are done or the caller says finish."""
        for rows in batches:
            began = time.monotonic()
            with self.lock:
                loss = self.step(run, rows)
            now = time.monotonic()
            run.advance(loss, len(rows), now - began)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            schedule.if_due()
            resting_until = now + (now - began) * (1 / run.plan.duty - 1)
            answer = rest(resting_until, run.report(loss, schedule.trouble), on_step)
            if answer == "finish":
                return
            if answer == "interrupt" and run.progress.step < run.plan.steps:
                schedule.now()
                raise Interrupted

    def step(self, run: Run, rows: Sequence[Tokenised]) -> float:
        """One optimiser step of `run` on `rows`; the mean loss per label token before it.

        The adapters of the run are in their places, and the lock is held. Micro-batches add up loss sums over
        one common divisor, so that they are one big batch exactly.
        """
        tokens = sum(row.label_tokens for row in rows)
        ordered = sorted(rows, key=lambda row: len(row.ids))  # rows of like length pad least
        loss = 0.0
        for begin in range(0, len(ordered), run.plan.micro_batch):
            part = self.loss_sum(ordered[begin : begin + run.plan.micro_batch]) / tokens
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

    def loss_sum(self, rows: Sequence[Tokenised]) -> torch.Tensor:
        """Σ of cross-entropies over the label tokens of `rows`, float32, with the adapters in their places.

        The head runs only on positions where some row has a label: with a large vocabulary the logits of
        the prompts would be the largest tensor of the whole step. There is no attention mask: rows are padded
        at their end, where causal attention sees nothing that a label depends on, and a mask would make every
        block keep a (rows, length, length) copy of it.
        """
        batch = collate(rows, self.base.tokenizer.pad_token_id)
        keep = torch.from_numpy(np.flatnonzero((batch.labels[:, 1:] != IGNORED).any(axis=0)))
        targets = torch.from_numpy(batch.labels)[:, keep + 1].to(self.base.device)
        keep = keep.to(self.base.device)
        output = self.base.model(
            input_ids=torch.from_numpy(batch.ids).to(self.base.device),
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
        limit = min(sequence_len or longest, self.base.max_positions or longest)
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
        with self.places.installed({CARRIED: adapter}), torch.no_grad(), bar:
            for begin in range(0, len(ordered), batch):
                rows = ordered[begin : begin + batch]
                with self.lock:
                    total += self.loss_sum(rows).item()
                bar.update(len(rows))
        return Evaluation(total / tokens, tokens)

    def generate(self, adapter: Adapter | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to `prompts`, in the form that training used. A long prompt loses its beginning."""
        said: list[str] = []
        bar = _bar("generating", len(prompts), self._bars)
        with self.places.installed({CARRIED: adapter}), bar:
            for begin in range(0, len(prompts), GENERATION_BATCH):
                part = prompts[begin : begin + GENERATION_BATCH]
                with self.lock:
                    said += answers(self.base, part, max_new_tokens)
                bar.update(len(part))
        return said

    def answer_with(self, adapter: Adapter | None) -> None:
        """Put the adapter that `answer` uses in its place (None: the base alone), between two steps."""
        self.places.answer_with(adapter)

    def answering(self) -> AbstractContextManager[None]:
        """A turn in which `answer` may be called; training goes on after it as if nothing had been."""
        return self.places.answering()

    def answer(self, prompt: str, max_new_tokens: int, on_text: OnText | None = None) -> str:
        """Greedy answer of the base with the adapter of `answer_with`, within `answering`.

        `on_text` hears the answer in pieces, word by word, while it is made.
        """
        return answers(self.base, [prompt], max_new_tokens, on_text)[0]

    def starting_factors(self, start: Start) -> Adapter:
        """The factors to train: those given, filled up to the rank, or fresh (B = 0, A from the seed)."""
        ranks = {module: min(start.ranks.of(module), *shape) for module, shape in self.shapes.items()}
        empty = {
            module: LoraFactors(np.zeros((out, 0), np.float32), np.zeros((0, in_), np.float32))
            for module, (out, in_) in self.shapes.items()
        }
        given = empty if start.adapter is None else start.adapter
        self.places.check(given, ranks)
        filled = {m: pad(given[m], rank, f"{start.seed}/{m}") for m, rank in ranks.items()}
        if start.adapter is not None:
            return filled
        return {m: LoraFactors(f.b, f.a * np.float32(FRESH_ROWS)) for m, f in filled.items()}


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
