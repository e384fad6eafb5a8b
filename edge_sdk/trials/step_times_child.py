"""How long training steps take on this machine, from a few seconds of real ones on a cut-down model.

The model is made from the configuration alone (`cut_down_model`). The very code of the trainer runs on it, so
nothing has to be assumed about kernels, casts or PEFT; `core.choice.step_time` carries the result over to the
whole model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime, Work, fit, work
from edge_sdk.core.lora import LoraFactors
from edge_sdk.model import base_model
from edge_sdk.text.rows import Tokenised
from edge_sdk.training.loss import summed_cross_entropy
from edge_sdk.training.plan import Plan, Start, StepAnswer, StepReport
from edge_sdk.training.trainer import Trainer
from edge_sdk.trials.cut_down_model import VOCAB, cut_down, filled

HEAD_VALUES = 1 << 26  # at most so many weights of the head: 134 MB in bfloat16
HEAD_TOKENS = 128
SHORT_TOKENS, MEDIUM_TOKENS = 16, 64
SMALL_BLOCK = 20_000_000  # parameters; models of such blocks are timed at two depths, 1 and
DEEPER = 3
STEP_S = 0.8  # the longest step that is measured takes about this
ENOUGH_S, MOST_STEPS = 0.5, 6  # of one setting, after a step to warm up
CARRIED_RANK = 16


@dataclass(frozen=True)
class LargestStep:
    """The most that a step of the assignments will be: what is worth measuring."""

    micro_batch: int
    sequence_len: int
    ranks: tuple[Ranks, ...]
    carries: bool = False


def step_times(
    config: Mapping[str, Any],
    largest: LargestStep,
    device: str = "auto",
    quantise: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTime:
    """Measure for a few seconds how long steps take, on torch's current number of threads.

    Args:
        config: the base model's `config.json`.
        largest: the largest step, and the ranks to choose from.
        device: as in `Options.device`.
        quantise: NF4, as `base_model.load` has it.
        clock: tells seconds.

    Raises:
        InputError: transformers knows no such model, or this machine has no such device.
    """
    if quantise:
        base_model.import_libraries()  # quietly
    whole = facts_from_config(config, {})
    small = whole.layers > 1 and whole.linear_parameters / whole.layers < SMALL_BLOCK
    base, facts = cut_down(config, min(whole.layers, DEEPER) if small else 1, device, quantise)
    longest = min(largest.sequence_len, base.max_positions or largest.sequence_len)
    largest = replace(largest, sequence_len=longest)
    measured = _steps(_Bench(base, facts, clock), largest)
    measured.append(_head(facts.hidden, whole.vocab, base.device, base.model.dtype, clock))
    del base
    if small:  # a second depth tells what blocks cost from what is outside them
        measured.append(_short_step(_Bench(*cut_down(config, 1, device, quantise), clock), largest))
    else:  # where blocks are large, the rest is little, and counts as theirs
        measured = [(replace(done, micro_batches=0.0), seconds) for done, seconds in measured]
    base_model.release_memory()
    return fit(measured)


def _steps(bench: _Bench, largest: LargestStep) -> list[tuple[Work, float]]:
    """Steps of few and of many tokens, of the lowest and the highest rank, recomputing, and carrying."""
    by_size = sorted(largest.ranks, key=bench.facts.adapter_values)
    low, high = by_size[0], by_size[-1]
    most = largest.micro_batch * largest.sequence_len
    medium = min(MEDIUM_TOKENS, most)
    measured = [_short_step(bench, largest), bench.step(_setting(low, medium, medium))]
    tokens = _affordable(measured[0][1], measured[1][1], most)
    length = min(largest.sequence_len, tokens)
    for ranks in {low, high}:
        measured.append(bench.step(_setting(ranks, length, tokens)))
    plain = _setting(low, length, tokens)
    measured.append(bench.step(replace(plain, checkpointing=True)))
    if largest.carries:
        measured.append(bench.step(replace(plain, carry_rank=CARRIED_RANK, carried_dtype="int8")))
    return measured


def _short_step(bench: _Bench, largest: LargestStep) -> tuple[Work, float]:
    """One row of few tokens, at the lowest rank."""
    length = min(SHORT_TOKENS, largest.sequence_len)
    low = min(largest.ranks, key=bench.facts.adapter_values)
    return bench.step(_setting(low, length, length))


def _setting(ranks: Ranks, length: int, tokens: int) -> Setting:
    """`tokens` at a time, in rows of `length`."""
    return Setting(ranks, 0, length, max(1, tokens // length))


def _affordable(short_s: float, medium_s: float, most: int) -> int:
    """How many tokens a step of STEP_S has, going by steps of SHORT_TOKENS and of MEDIUM_TOKENS."""
    by_token = max(medium_s - short_s, 1e-6) / (MEDIUM_TOKENS - SHORT_TOKENS)
    return min(most, max(MEDIUM_TOKENS, int((STEP_S - short_s) / by_token)))


# --- real steps ----------------------------------------------------------------------------------


class _Bench:
    """Runs steps of the trainer on a cut-down model."""

    def __init__(self, base: base_model.LoadedBase, facts: ModelFacts, clock: Callable[[], float]) -> None:
        self.facts, self._clock = facts, clock
        self._trainer = Trainer(base, facts.shapes, 1.0, progress=False)
        self._draw = np.random.default_rng(0)

    def step(self, setting: Setting) -> tuple[Work, float]:
        """The work of one step, and the seconds that it took: a median."""
        rows = [self._row(setting.sequence_len) for _ in range(setting.micro_batch)]
        plan = Plan(
            steps=1 + MOST_STEPS,
            batch=setting.micro_batch,
            micro_batch=setting.micro_batch,
            sequence_len=setting.sequence_len,
            learning_rate=1e-6,  # nothing may diverge; what is learnt does not matter
            checkpointing=setting.checkpointing,
        )
        carried = self._carried(setting.carry_rank) if setting.carry_rank else None
        start = Start(None, carried, setting.ranks, 0, setting.carried_dtype)
        watch = Stopwatch(self._clock, ENOUGH_S)
        self._trainer.train(start, rows, plan, on_step=watch)
        return work(self.facts, setting, setting.micro_batch), watch.median_s()

    def _row(self, length: int) -> Tokenised:
        ids = tuple(int(token) for token in self._draw.integers(0, min(VOCAB, self.facts.vocab), length))
        return Tokenised(ids=ids, labels=ids)

    def _carried(self, rank: int) -> dict[str, LoraFactors]:
        """An adapter of small values."""
        adapter = {}
        for module, (out, in_) in self.facts.shapes.items():
            r = min(rank, out, in_)
            b, a = (self._draw.uniform(-1e-3, 1e-3, shape).astype("f4") for shape in ((out, r), (r, in_)))
            adapter[module] = LoraFactors(b, a)
        return adapter


class Stopwatch:
    """Times steps, as the trainer's `on_step`, and says when `enough_s` of them were seen, two at least.

    The first step warms up and does not count.
    """

    def __init__(self, clock: Callable[[], float], enough_s: float) -> None:
        self._clock, self._enough_s = clock, enough_s
        self._ends: list[float] = []

    def __call__(self, report: StepReport) -> StepAnswer:
        """After a step."""
        self._ends.append(self._clock())
        seen_s = self._ends[-1] - self._ends[0]
        return "finish" if seen_s >= self._enough_s and len(self._ends) > 2 else "continue"

    def median_s(self) -> float:
        """Seconds of a step."""
        return statistics.median(after - before for before, after in pairwise(self._ends))


def _head(
    hidden: int, vocab: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> tuple[Work, float]:
    """The product with the head, the loss and its gradient, for a part of a large vocabulary."""
    width = min(vocab, max(1, HEAD_VALUES // hidden))
    weight = filled((width, hidden), device, dtype)
    states = filled((HEAD_TOKENS, hidden), device, dtype).requires_grad_(True)
    targets = torch.zeros(HEAD_TOKENS, dtype=torch.int64, device=device)

    def once() -> float:
        began = clock()
        loss = summed_cross_entropy(torch.nn.functional.linear(states, weight), targets)
        loss.backward()
        assert states.grad is not None
        states.grad.flatten()[0].item()  # waits for an accelerator
        return clock() - began

    once()
    seconds = statistics.median(_until(once, ENOUGH_S))
    return Work(layer_passes=0.0, mega_logits=HEAD_TOKENS * width / 1e6), seconds


def _until(measure: Callable[[], float], seconds: float) -> Iterator[float]:
    """Measurements until they add up to `seconds`, two at least."""
    total, count = 0.0, 0
    while count < 2 or (total < seconds and count < MOST_STEPS):
        found = measure()
        total, count = total + found, count + 1
        yield found
