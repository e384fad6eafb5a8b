"""The choice of how a device trains: the largest rank that its memory, its time and its link carry.

Ranks come first; under the rule `carry` the order is that of `carried.splits`. Only where no rank of the
ladder fits is the way of training changed, in this order, from what costs nothing of the result to what does:

1. smaller micro-batches, whose gradients add up (rounding alone differs);
2. activations computed twice (rounding alone, for about a third more time);
3. moments of 8 bits in the optimiser;
4. shorter sequences, which lose text.

The sequence length never exceeds the longest example that the device has: that costs nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edge_sdk.core.adapter_file.dtypes import BYTES_PER_VALUE, WireDtype
from edge_sdk.core.choice.carried import CarriedDtype, splits
from edge_sdk.core.choice.memory import CPU, Placement, estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Training

# Text is not cut shorter than this to save memory: an instruction and its answer no longer fit.
SHORTEST_SEQUENCE = 64


@dataclass(frozen=True)
class Limits:
    """What an assignment may take. None: not limited, or not measured."""

    budget_bytes: int
    deadline_s: float | None = None  # from receiving an assignment to delivering it
    upload_bytes_s: float | None = None
    download_bytes_s: float | None = None
    upload_dtype: WireDtype = "float32"
    download_dtype: WireDtype = "float32"


@dataclass(frozen=True)
class Device:
    """What predictions rest on. `correction` scales the predicted bytes by what was measured before."""

    placement: Placement = CPU
    times: StepTime | None = None  # None: not calibrated
    correction: float = 1.0
    eight_bit: bool = True  # whether 8-bit moments can be had: bitsandbytes works


@dataclass(frozen=True)
class Carry:
    """Components of the global adapter that there are to hold frozen. `settled`: all of them, or nothing."""

    components: int = 0
    settled: bool = False


@dataclass(frozen=True)
class Candidate:
    """One way of training. `why_not` is empty where it fits; times are None where nothing was measured."""

    setting: Setting
    peak_bytes: int
    step_s: float | None
    assignment_s: float | None  # training, and both transfers where the link was measured
    upload_bytes: int
    why_not: str

    @property
    def rank(self) -> int:
        """The rank that the coordinator is told."""
        return self.setting.ranks.largest

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.why_not


@dataclass(frozen=True)
class RankChoice:
    """How to train, and why. `candidates`: all there is to choose from in the chosen way, best first."""

    setting: Setting
    limits: Limits
    candidates: tuple[Candidate, ...]
    reason: str

    @property
    def rank(self) -> int:
        """The chosen candidate's."""
        return self.chosen.rank

    @property
    def chosen(self) -> Candidate:
        """The candidate that was taken."""
        return next(c for c in self.candidates if c.setting == self.setting)


def choose(
    facts: ModelFacts,
    training: Training,
    ladder: Sequence[Ranks],
    carry: Carry,
    limits: Limits,
    device: Device = Device(),
    longest: int | None = None,
) -> RankChoice:
    """The largest of `ladder` that fits, in the first way of training in which any does.

    Args:
        facts: the base model.
        training: what the federation asks for.
        ladder: ranks in any order.
        carry: what there is to hold frozen; nothing but under the rule `carry`.
        limits: what an assignment may take.
        device: what the predictions rest on.
        longest: tokens of the longest local example, where known.

    Raises:
        InputError: an impossible ladder, or nothing fits; says what is needed and what would help.
    """
    check_ladder(facts, ladder)
    length = min(training.sequence_len, longest or training.sequence_len)
    tried: tuple[Candidate, ...] = ()
    for way in _ways(training.batch, length, device.eight_bit):
        settings = [
            replace(way, ranks=ranks, carry_rank=carried, carried_dtype=dtype)
            for ranks, carried, dtype in _preferred(facts, ladder, carry)
        ]
        tried = tuple(predict(facts, setting, training, limits, device) for setting in settings)
        in_memory = [c for c in tried if c.peak_bytes <= limits.budget_bytes]
        if in_memory:
            chosen = next((c for c in in_memory if c.fits), in_memory[-1])
            return RankChoice(chosen.setting, limits, tried, _reason(chosen, tried, training, length))
    least = min(tried, key=lambda candidate: candidate.peak_bytes)
    raise InputError(
        f"not enough memory to train: {least.setting} needs {human_bytes(least.peak_bytes)}, the budget is "
        f"{human_bytes(limits.budget_bytes)}; close other programs, raise the budget, or ask the host for a "
        "smaller base model"
    )


def _preferred(
    facts: ModelFacts, ladder: Sequence[Ranks], carry: Carry
) -> list[tuple[Ranks, int, CarriedDtype]]:
    """What to train and what to carry, best first: by size; under `carry` in the order that was measured.

    Unequal ranks stand where their larger one does.
    """
    falling = sorted(ladder, key=facts.adapter_values, reverse=True)
    if carry.components == 0:
        return [(ranks, 0, "float32") for ranks in falling]
    order = splits([ranks.largest for ranks in falling], carry.components)
    if carry.settled:
        order = [split for split in order if split.carry_rank == carry.components]
    return list(
        dict.fromkeys(
            (ranks, split.carry_rank, split.dtype)
            for split in order
            for ranks in falling
            if ranks.largest == split.rank
        )
    )


def _ways(batch: int, length: int, eight_bit: bool = True) -> Iterator[Setting]:
    """Ways of training, in the order of the module's docstring; the ranks are put in later."""
    ranks = Ranks.uniform(1)
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    for recomputes in (False, True):
        for size in sizes:
            yield Setting(ranks, 0, length, size, recomputes)
    while True:
        yield Setting(ranks, 0, length, 1, True, "adamw8bit" if eight_bit else "adamw")
        if length <= SHORTEST_SEQUENCE:
            return
        length = max(SHORTEST_SEQUENCE, length // 2)


def leanest(
    facts: ModelFacts,
    training: Training,
    ladder: Sequence[Ranks],
    carry: Carry,
    limits: Limits,
    device: Device = Device(),
) -> tuple[Candidate, ...]:
    """The candidates of the last way of training, best first: what is there to show where nothing fits."""
    *_, way = _ways(training.batch, training.sequence_len, device.eight_bit)
    return tuple(
        predict(
            facts,
            replace(way, ranks=ranks, carry_rank=carried, carried_dtype=dtype),
            training,
            limits,
            device,
        )
        for ranks, carried, dtype in _preferred(facts, ladder, carry)
    )


def check_ladder(facts: ModelFacts, ladder: Sequence[Ranks]) -> None:
    """Refuse an empty ladder and one that no module has room for.

    Raises:
        InputError: names the rank and the largest module.
    """
    if not ladder:
        raise InputError("the ladder of ranks is empty; give at least one rank")
    if not facts.shapes:
        raise InputError("the base model has no target modules; name the linear layers that LoRA is to adapt")
    module, limit = facts.largest_rank()
    most = max(ranks.largest for ranks in ladder)
    if most > limit:
        out_features, in_features = facts.shapes[module]
        raise InputError(
            f"rank {most} on the ladder is larger than any module: {module} is "
            f"{out_features} × {in_features}, so at most {limit}"
        )


def predict(
    facts: ModelFacts, setting: Setting, training: Training, limits: Limits, device: Device
) -> Candidate:
    """Predict one way of training and compare it with the limits."""
    predicted = estimate(facts, setting, device.placement)
    moving = predicted.peak_bytes - predicted.framework
    peak = predicted.framework + round(device.correction * moving)
    upload = round(BYTES_PER_VALUE[limits.upload_dtype] * facts.adapter_values(setting.ranks))
    step_s = device.times.step_s(facts, setting, training.batch) if device.times else None
    sent_s = upload / limits.upload_bytes_s if limits.upload_bytes_s else 0.0
    fetched_values = facts.adapter_values(setting.carry_rank or setting.ranks)
    fetched = BYTES_PER_VALUE[limits.download_dtype] * fetched_values
    sent_s += fetched / limits.download_bytes_s if limits.download_bytes_s else 0.0
    whole_s = None if step_s is None else step_s * training.steps + sent_s
    why_not = ""
    if peak > limits.budget_bytes:
        over = human_bytes(peak - limits.budget_bytes)
        why_not = f"needs {human_bytes(peak)}, {over} over the budget"
    elif limits.deadline_s and (whole_s if whole_s is not None else sent_s) > limits.deadline_s:
        needed = whole_s if whole_s is not None else sent_s
        what = "its transfers" if sent_s > needed / 2 else "training"
        why_not = f"needs {needed:.0f} s of {limits.deadline_s:.0f} s, most of it for {what}"
    return Candidate(setting, peak, step_s, whole_s, upload, why_not)


def _reason(chosen: Candidate, candidates: Sequence[Candidate], training: Training, length: int) -> str:
    """Why this one, and why not the next."""
    text = f"rank {chosen.setting.ranks} needs {human_bytes(chosen.peak_bytes)}"
    if chosen.why_not:
        text += f"; no rank is quick enough: it {chosen.why_not}, and late work still counts"
    setting = chosen.setting
    if setting.carry_rank:
        text += f" with {setting.carry_rank} components carried in {setting.carried_dtype}"
    better = candidates[: candidates.index(chosen)]
    if not better and len(candidates) > 1:
        text += "; it is the top of the ladder"
    elif better and not chosen.why_not:
        carried = f" with {better[-1].setting.carried_dtype}" if better[-1].rank == chosen.rank else ""
        text += f"; rank {better[-1].setting.ranks}{carried} {better[-1].why_not}"
    changes = []
    if setting.micro_batch < training.batch:
        changes.append(f"the batch of {training.batch} runs {setting.micro_batch} at a time")
    if setting.checkpointing:
        changes.append("activations are computed twice")
    if setting.optimizer != "adamw":
        changes.append("the optimiser keeps 8-bit moments")
    if setting.sequence_len < length:
        changes.append(f"examples are cut to {setting.sequence_len} tokens")
    return text + ("; to fit at all, " + ", ".join(changes) if changes else "")
