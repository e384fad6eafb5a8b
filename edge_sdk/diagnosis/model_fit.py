"""Would a model fit on this device, and at which rank? Asked before there is a federation.

The answer needs the model's `config.json` and nothing else of it: no weights, no download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_sdk.core.choice.memory import ACCELERATOR, CPU, Estimate, Placement, estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts, Shapes, facts_from_config
from edge_sdk.core.choice.rank import Candidate, Carry, Device, Limits, check_ladder, choose, leanest
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import CARRYING, Training
from edge_sdk.core.profile import DeviceProfile
from edge_sdk.model.files import find, read_json_object, require_no_code
from edge_sdk.options import Options, cache_dir
from edge_sdk.participation.decision import BUDGET_SHARE, budget_bytes, quantisation


@dataclass(frozen=True)
class FitQuestion:
    """What to look at. `options` as a device would join with them: a profile there is a class of devices.

    `carries`: whether devices hold the global adapter frozen; None: as this project's rule of that name has
    it. `calibrate`: measure step times, which takes from 4 to 20 seconds and more for large models.
    """

    model: str
    options: Options
    ladder: tuple[int, ...]
    training: Training = field(default_factory=Training)
    rule: str = "flexlora"
    rank_cap: int = 32  # of the global adapter: what there is to carry under the rule `carry`
    deadline_s: float | None = None
    calibrate: bool = True
    carries: bool | None = None

    @property
    def holds_global(self) -> bool:
        """Whether devices hold the global adapter frozen and train fresh factors beside it."""
        return self.rule in CARRYING if self.carries is None else self.carries


@dataclass(frozen=True)
class ModelFit:
    """The answer. `chosen` is None where nothing fits; `terms` are of the chosen way, or else of the leanest.

    `measured`: whether `machine` is this one; a class of devices otherwise, of which no time is known.
    `place`: where it computes, in which dtype. `notice`: why not in 4 bits although that was asked for.
    """

    model: str
    facts: ModelFacts
    machine: DeviceProfile
    measured: bool
    place: str
    quantised: bool
    notice: str
    question: FitQuestion
    limits: Limits
    times: StepTime | None
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    terms: Estimate
    reason: str


def examine(question: FitQuestion, say: Callable[[str], None] = lambda _: None) -> ModelFit:
    """Answer; `say` hears what is being measured when that takes seconds.

    Raises:
        InputError: no such model, a configuration that lacks a field, a ladder or a budget that cannot be.
    """
    from edge_sdk.model import base_model

    file = config_file(question.model)
    config = read_json_object(file)
    require_no_code(file, False, "`profile` runs none: `join --trust-remote-code` measures it as it trains")
    _facts(config, {}, file)  # a field that is missing is named here; transformers would fill it in
    facts = _facts(config, base_model.target_modules(file), file)
    ladder = _ladder(question)
    check_ladder(facts, ladder)
    options, measured = _machine(question.options)
    machine = options.profile
    assert machine is not None
    limits = Limits(budget_bytes(options), question.deadline_s)
    quantised, notice = _quantised(options, measured)
    placement, place = _placement(options, measured, quantised)
    say("measuring what the libraries take (once for each version of them)")
    framework = _framework_bytes(question.options.device if measured else "cpu", quantised)
    device = Device(replace(placement, framework_bytes=framework))
    question = replace(question, options=replace(options, device=question.options.device))
    candidates, chosen, reason = _choose(question, facts, ladder, limits, device)
    if measured and chosen and question.calibrate:
        say("timing training steps on a cut-down model")
        device = replace(device, times=_times(config, question, ladder, quantised))
        candidates, chosen, reason = _choose(question, facts, ladder, limits, device)
    shown = (chosen or min(candidates, key=lambda candidate: candidate.peak_bytes)).setting
    return ModelFit(
        model=question.model,
        facts=facts,
        machine=machine,
        measured=measured,
        place=place,
        quantised=quantised,
        notice=notice,
        question=question,
        limits=limits,
        times=device.times,
        candidates=candidates,
        chosen=chosen,
        terms=estimate(facts, shown, device.placement),
        reason=reason,
    )


def config_file(model: str) -> Path:
    """The `config.json` of `tiny`, of a directory, of a hub model that was downloaded, or a bare file.

    Raises:
        InputError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    if model.endswith(".json"):
        raise InputError(f"{model}: no such file")
    directory = find(model)
    if directory is None:
        raise InputError(
            f"{model}: not on this machine; download its config.json, which is enough, and name that file"
        )
    return directory / "config.json"


def _facts(config: Mapping[str, Any], shapes: Shapes, file: Path) -> ModelFacts:
    """Facts, or an error that names the file."""
    try:
        return facts_from_config(config, shapes)
    except InputError as error:
        raise InputError(str(error).replace("config.json", str(file), 1)) from error


def _ladder(question: FitQuestion) -> list[Ranks]:
    """The ranks to choose from: the one that was asked about, or the ladder."""
    if question.options.ranks is not None:
        return [question.options.ranks]
    return [Ranks.uniform(rank) for rank in sorted(set(question.ladder))]


def _machine(options: Options) -> tuple[Options, bool]:
    """The options with a profile in any case, and whether it is this machine's."""
    from edge_sdk.machine.probe import probe

    measured = options.profile is None
    profile = options.profile or probe(quick=True, folder=cache_dir())
    if options.device == "cpu":
        profile = replace(profile, accelerators=())
    elif not measured and options.device != "auto":
        raise InputError(f"device {options.device!r} of a profile: only auto and cpu can be asked about")
    return replace(options, profile=profile), measured


def _quantised(options: Options, measured: bool) -> tuple[bool, str]:
    """Whether the base would be in 4 bits, and why not if that was wished. A class is believed to be able."""
    if not measured:
        return options.quantise, ""
    found = quantisation(replace(options, isolate=False))  # steps are timed in this very process
    return found.four_bit, found.notice


def _placement(options: Options, measured: bool, quantised: bool) -> tuple[Placement, str]:
    """Where and how it would compute, and that in words."""
    if measured:
        from edge_sdk.machine.torch_device import dtype_name, torch_device
        from edge_sdk.model import base_model

        place = torch_device(options.device)
        return base_model.placement(options.device, quantised), f"{place}, {dtype_name(place)}"
    assert options.profile is not None
    placement = class_placement(options.profile, quantised)
    accelerator = options.profile.accelerator
    dtype = "bfloat16" if placement.compute_bytes == 2 else "float32"
    return placement, f"{accelerator.kind if accelerator else 'cpu'}, {dtype}"


def class_placement(profile: DeviceProfile, quantised: bool) -> Placement:
    """How training would compute on a device of this class, by the rule of `torch_device.compute_dtype`."""
    accelerator = profile.accelerator
    if accelerator is None:
        native = profile.gemm_dtype == "bfloat16" or "avx512_bf16" in (profile.cpu_features or ())
    else:
        native = accelerator.kind == "cuda" and bool(accelerator.bf16)
    compute_bytes = 2 if native else 4
    placement = replace(ACCELERATOR if accelerator else CPU, compute_bytes=compute_bytes)
    return placement if quantised else replace(placement, weight_bytes=compute_bytes)


def _framework_bytes(device: str, quantised: bool) -> int:
    from edge_sdk.trials.library_memory import framework_bytes

    return framework_bytes(device, quantised, cache_dir())


def _times(
    config: Mapping[str, Any], question: FitQuestion, ladder: list[Ranks], quantised: bool
) -> StepTime:
    """Step times on this machine, with as many threads as training would have."""
    from edge_sdk.model import base_model
    from edge_sdk.trials import step_times_child

    base_model.use_threads(question.options.threads)
    training = question.training
    largest = step_times_child.LargestStep(
        training.batch, training.sequence_len, tuple(ladder), carries=question.holds_global
    )
    return step_times_child.step_times(config, largest, question.options.device, quantised)


def _choose(
    question: FitQuestion,
    facts: ModelFacts,
    ladder: list[Ranks],
    limits: Limits,
    device: Device,
) -> tuple[tuple[Candidate, ...], Candidate | None, str]:
    """(candidates, the chosen one or None, why)."""
    carry = Carry(question.rank_cap if question.holds_global else 0)
    asked = (facts, question.training, ladder, carry, limits, device)
    try:
        chosen = choose(*asked)
    except InputError:
        candidates = leanest(*asked)
        return candidates, None, _why_nothing(question, candidates, limits)
    return chosen.candidates, chosen.chosen, chosen.reason


def _why_nothing(question: FitQuestion, candidates: tuple[Candidate, ...], limits: Limits) -> str:
    """What the least needs, and what would help."""
    least = min(candidates, key=lambda candidate: candidate.peak_bytes)
    machine = question.options.profile
    total = machine.trainable_memory_total_bytes() if machine else None
    needs = (
        f"nothing fits in {human_bytes(limits.budget_bytes)}; the least needs {human_bytes(least.peak_bytes)}"
    )
    if total is not None and least.peak_bytes > total:
        return f"{needs}, and the device has {human_bytes(total)}; a smaller model is needed"
    enough_mb = -(-least.peak_bytes // 10**7) * 10
    return f"{needs}; --memory-budget {enough_mb}MB would allow it, if so much is free by then"


def budget_in_words(fit: ModelFit) -> str:
    """Where the budget comes from."""
    if fit.question.options.memory_budget_bytes is not None:
        return "as you said"
    share = "half" if BUDGET_SHARE == 0.5 else f"{BUDGET_SHARE:.0%}"
    return f"{share} of what is free" + ("" if fit.measured else ", which is assumed to be half of all")


def way_of(setting: Setting) -> str:
    """How a setting trains, without its ranks, in words."""
    parts = [f"{setting.micro_batch} at a time, {setting.sequence_len} tokens each"]
    parts += ["activations computed twice"] if setting.checkpointing else []
    parts += ["8-bit optimiser"] if setting.optimizer == "adamw8bit" else []
    return ", ".join(parts)
