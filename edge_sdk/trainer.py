"""On-device training: LoRA factors on a frozen base model, in one PEFT model that is never reloaded.

Adapters cross this boundary as `edge_sdk.core.lora.Adapter`, with the scaling folded into `b`; inside, PEFT
holds `b / s` with `lora_alpha = s·r`. Training has no randomness but the order of the data and the fresh
factors, which both follow from `Start.seed`: no dropout, and no global random state is read or set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from edge_sdk import checkpoint as checkpoints
from edge_sdk.base_model import LoadedBase
from edge_sdk.checkpoint import Progress
from edge_sdk.core.codec import Shapes, peft_config
from edge_sdk.core.errors import AdapterError, InputError
from edge_sdk.core.flexlora import pad
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix
from edge_sdk.core.messages import Directive
from edge_sdk.dataset import IGNORED, Tokenised, collate, prompt_ids

LOCAL, CARRIED = "local", "carried"  # the two places of an adapter in the PEFT model

# Adam's first steps have the full size whatever the gradient says, so they are taken small: linear over the
# first tenth of the assignment. Constant from then on: averaging over devices does what a decay would do.
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 1.0
REST_SLICE_S = 0.5  # in calm mode the caller is heard at least this often
GENERATION_BATCH = 16


class Abandoned(Exception):  # noqa: N818
    """`on_step` answered `abandon`: the assignment is worth nothing any more. Not an error."""


@dataclass(frozen=True)
class Start:
    """What to train. Rule `flexlora`: `adapter`, trained itself. Rule `carry`: `carried` frozen (None at the
    first version) with fresh factors of `rank` on top. A module narrower than `rank` has min(out, in)."""

    adapter: Adapter | None
    carried: Adapter | None
    rank: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """How to train. `micro_batch` and `duty` suit the device and leave the result the same (but for rounding).

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
                f"steps {self.steps}, batch {self.batch} and micro-batch {self.micro_batch} must be at least 1, "
                f"and duty {self.duty} above 0 and at most 1"
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
    `seconds` is computing time without rests, over all parts of a resumed run."""

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
        self._bars = sys.stderr.isatty() if progress is None else progress
        self._selects_logits = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        with _without_peft_notices():
            from peft import get_peft_model

            self._peft = get_peft_model(
                base.model, self._config(1), adapter_name=LOCAL, low_cpu_mem_usage=True
            )
        self._remove(LOCAL)

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
            InputError: no examples, rows longer than the plan or the model allows, or a loss that is not finite.
            AdapterError: factors that do not fit the modules.
        """
        self._check_rows(examples, plan.sequence_len)
        adapter = self._starting_factors(start)
        with self._installed({LOCAL: adapter, CARRIED: start.carried}):
            run = _Run(self._trainable(), plan)
            identity = _identity(start, adapter, examples, plan, self._scaling) if checkpoint else {}
            if checkpoint and (found := checkpoints.read(checkpoint, identity)):
                run.restore(*found)
            save = (lambda: checkpoints.write(checkpoint, identity, *run.state())) if checkpoint else None
            self._loop(run, start.seed, examples, on_step, save)
            done = run.progress
            return Trained(
                self._factors(LOCAL), done.step, done.examples, done.loss_first, done.loss_last, done.seconds
            )

    def _loop(
        self,
        run: _Run,
        seed: int,
        examples: Sequence[Tokenised],
        on_step: Callable[[StepReport], Directive],
        save: Callable[[], None] | None,
    ) -> None:
        """Steps until the plan is done or the caller says finish."""
        plan, saved_at = run.plan, time.monotonic()
        with self._bar("training", plan.steps, run.progress.step) as bar:
            while run.progress.step < plan.steps:
                began = time.monotonic()
                rows = [
                    examples[i] for i in batch_indices(len(examples), plan.batch, run.progress.step, seed)
                ]
                loss = self._step(run, rows)
                now = time.monotonic()
                run.advance(loss, len(rows), now - began)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if save and now - saved_at >= plan.checkpoint_s:
                    save()
                    saved_at = now
                resting_until = now + (now - began) * (1 / plan.duty - 1)
                if _rest(resting_until, run.report(loss), on_step) == "finish":
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
                f"training diverged at step {run.progress.step + 1} (loss {loss:.3g}, gradient norm {norm:.3g}); "
                f"lower the learning rate, now {run.plan.learning_rate:g}"
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

    def _check_rows(self, rows: Sequence[Tokenised], limit: int) -> None:
        """Refuse rows that the plan or the model has no place for."""
        if not rows:
            raise InputError("there are no examples to train on or to evaluate")
        longest = max(len(row.ids) for row in rows)
        limit = min(limit, self._base.max_positions or limit)
        if longest > limit:
            raise InputError(
                f"a row has {longest} tokens, more than {limit}; tokenise with that sequence_len"
            )

    # --- asking ------------------------------------------------------------------------------

    def evaluate(self, adapter: Adapter | None, examples: Sequence[Tokenised], batch: int = 16) -> Evaluation:
        """Mean loss per label token of the base with `adapter` (None: the base alone)."""
        self._check_rows(examples, max(len(row.ids) for row in examples) if examples else 0)
        ordered = sorted(examples, key=lambda row: len(row.ids))
        tokens = sum(row.label_tokens for row in ordered)
        total = 0.0
        bar = self._bar("evaluating", len(ordered))
        with self._installed({CARRIED: adapter}), torch.no_grad(), bar:
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
        bar = self._bar("generating", len(prompts))
        with self._installed({CARRIED: adapter}), torch.no_grad(), bar:
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

    def _bar(self, label: str, total: int, initial: int = 0) -> Any:
        """A progress bar that appears after a second."""
        return tqdm(
            desc=label,
            total=total,
            initial=initial,
            delay=1.0,
            disable=not self._bars,
            leave=False,
            file=sys.stderr,
        )

    # --- adapters in the PEFT model ----------------------------------------------------------

    @contextmanager
    def _installed(self, adapters: Mapping[str, Adapter | None]) -> Iterator[None]:
        """Put adapters in their places, active all at once, gradients for LOCAL alone; take them out after."""
        present = {name: adapter for name, adapter in adapters.items() if adapter is not None}
        try:
            for name, adapter in present.items():
                self._install(name, adapter)
            self._peft.base_model.set_adapter(list(present), inference_mode=True)
            if LOCAL in present:
                self._peft.base_model.set_requires_grad(LOCAL, requires_grad=True)
            yield
        finally:
            for name in present:
                self._remove(name)

    def _install(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under `name`. A module that holds less than the adapter's rank is padded with zeros."""
        self._check_modules(adapter)
        rank = max(factors.rank for factors in adapter.values())
        with _without_peft_notices():
            self._peft.add_adapter(name, self._config(rank), low_cpu_mem_usage=True)
        for module, shape in self._shapes.items():
            full = pad(adapter[module], min(rank, *shape), f"{name}/{module}")
            a, b = self._weights(module, name)
            a.weight = self._parameter(full.a)
            b.weight = self._parameter(full.b / np.float32(self._scaling))

    def _remove(self, name: str) -> None:
        """Delete an adapter, which must not be active at that moment, or PEFT warns that it picks another."""
        self._peft.base_model.set_adapter([])
        if name in self._peft.peft_config:
            self._peft.base_model.delete_adapter(name)

    def _weights(self, module: str, name: str) -> tuple[Any, Any]:
        """The A and B layers of `module` in the adapter `name`."""
        layer = self._base.model.get_submodule(module)
        return layer.lora_A[name], layer.lora_B[name]

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        """`{module}.a` and `{module}.b` -> parameter of LOCAL, in a stable order."""
        found = {}
        for module in sorted(self._shapes):
            a, b = self._weights(module, LOCAL)
            found[f"{module}.a"], found[f"{module}.b"] = a.weight, b.weight
        return found

    def _factors(self, name: str) -> dict[str, LoraFactors]:
        """Copies of an adapter's factors, folded."""
        adapter = {}
        for module in self._shapes:
            a, b = (layer.weight.detach().cpu().numpy() for layer in self._weights(module, name))
            adapter[module] = LoraFactors(b * np.float32(self._scaling), a.copy())
        return adapter

    def _starting_factors(self, start: Start) -> Adapter:
        """The factors to train: those given, filled up to the rank, or fresh ones (B = 0, A from the seed)."""
        given = start.adapter
        if given is None:
            empty = {
                m: LoraFactors(np.zeros((o, 0), np.float32), np.zeros((0, i), np.float32))
                for m, (o, i) in self._shapes.items()
            }
            given = empty
        self._check_modules(given)
        filled = {}
        for module, shape in self._shapes.items():
            rank = min(start.rank, *shape)
            if given[module].rank > rank:
                raise AdapterError(f"module {module} has rank {given[module].rank}, the assignment {rank}")
            filled[module] = pad(given[module], rank, f"{start.seed}/{module}")
        return filled

    def _check_modules(self, adapter: Adapter) -> None:
        """An adapter holds exactly the target modules, in their shapes."""
        for module in sorted(set(self._shapes) ^ set(adapter)):
            raise AdapterError(
                f"module {module} is {'missing' if module in self._shapes else 'no target here'}"
            )
        for module, shape in self._shapes.items():
            if adapter[module].shape != shape:
                raise AdapterError(f"module {module} has shape {adapter[module].shape}, expected {shape}")
            if adapter[module].rank > min(shape):
                raise AdapterError(f"module {module} has rank {adapter[module].rank}, more than {min(shape)}")

    def _config(self, rank: int) -> Any:
        """The PEFT configuration that an exported adapter of `rank` has, with `fan_in_fan_out` as it is here."""
        from peft import LoraConfig  # imports bitsandbytes, which base_model.load has done quietly

        settings = peft_config("", self._shapes, rank, self._scaling)
        del settings["peft_type"], settings["base_model_name_or_path"]
        return LoraConfig(**settings, fan_in_fan_out=self._base.fan_in_fan_out)

    def _parameter(self, values: Matrix) -> torch.nn.Parameter:
        """Factors are held and trained in float32, whatever the base computes in."""
        tensor = torch.tensor(np.asarray(values, dtype=np.float32), device=self._base.device)
        return torch.nn.Parameter(tensor, requires_grad=False)


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


def batch_indices(examples: int, batch: int, step: int, seed: int) -> list[int]:
    """Which examples step `step` (from 0) takes: successive seeded permutations of all, cut into batches."""
    picked = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, examples)
        picked.append(int(np.random.default_rng([seed, epoch]).permutation(examples)[place]))
    return picked


def _rest(until: float, report: StepReport, on_step: Callable[[StepReport], Directive]) -> Directive:
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


def _identity(
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
        "scaling": scaling,
        "content": digest.hexdigest(),
        **settings,
    }


def _left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts aligned at their end, and the mask of their tokens; both (rows, longest)."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def _without_peft_notices() -> Iterator[None]:
    """PEFT reads an attribute that transformers has renamed; the notice is for PEFT, not for our callers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
