"""What a device finds out about itself before it works: the identity of its base model and its rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_sdk.connection.link_speed import Link
from edge_sdk.core.choice import rank as choice
from edge_sdk.core.choice.memory import Placement, estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import BaseMismatch, InputError
from edge_sdk.core.messages import Federation, JoinRequest
from edge_sdk.machine.probe import probe
from edge_sdk.model.files import read_config, resolve
from edge_sdk.options import Options, cache_dir
from edge_sdk.trials.four_bit import Preflight, four_bit_works

BUDGET_SHARE = 0.5  # of the memory that is free now: the rest stays the owner's


@dataclass(frozen=True)
class Known:
    """What this device has measured of itself. The defaults stand for: not measured."""

    framework_bytes: int = 0
    times: StepTime | None = None
    correction: float = 1.0
    link: Link = field(default_factory=Link)
    longest: int | None = None  # tokens of the longest local example
    eight_bit: bool = True  # whether 8-bit moments can be had
    four_bit: Preflight | None = None  # how a trial went that need not be made again
    most_bytes: int | None = None  # below the budget, where training has failed within that


def model_of(federation: Federation, options: Options) -> str:
    """Where this device loads the base model from: its own choice, or what the federation names."""
    return options.model or federation.base.model


def fingerprint(federation: Federation, options: Options, digests: Path) -> str:
    """What identifies this device's base model, with the federation's target modules.

    Args:
        federation: what the device is about to join.
        options: the device's.
        digests: file that remembers digests of large weight files.

    Raises:
        InputError: the model is not there.
        BaseMismatch: it has other modules than the federation's base.
    """
    from edge_sdk.model import base_model

    model = model_of(federation, options)
    resolve(model)  # a model that is not there is no mismatch
    try:
        return base_model.describe(model, ",".join(federation.base.modules), digests).fingerprint
    except InputError as error:
        raise BaseMismatch(
            f"{error}; the federation trains {federation.base.model}: load that model"
        ) from error


def request(base: str, options: Options) -> JoinRequest:
    """How this device introduces itself; `base` is its model's fingerprint."""
    device = options.profile or probe(quick=True, folder=options.state_dir or cache_dir())
    return JoinRequest(options.name, base, device.summary())


@dataclass(frozen=True)
class Decision:
    """How this device will train. `notice`: why it does not quantise although it was wished; else empty."""

    choice: choice.RankChoice
    quantise: bool
    notice: str = ""
    bitsandbytes: bool = True  # False: a process that imports it may die of that
    four_bit: Preflight | None = None  # how the trial went, where there was one


def decide(
    federation: Federation,
    options: Options,
    known: Known = Known(),
    ladder: Sequence[Ranks] | None = None,
    carried: int | None = None,
) -> Decision:
    """How to train, in 4 bits where that works on this device, and otherwise unquantised if that fits.

    Args:
        federation: what to train for.
        options: the device's.
        known: what it has measured of itself.
        ladder: the ranks to choose from, if not all that the device may.
        carried: components to carry, no more and no fewer, if that is settled.

    Raises:
        InputError: the memory is not enough, or would only be in 4 bits, which fail here; says why.
    """

    def choose(quantise: bool, eight_bit: bool = True) -> choice.RankChoice:
        own = replace(known, eight_bit=eight_bit)
        return choose_rank(federation, options, quantise, own, ladder, carried)

    if not options.quantise:
        return Decision(choose(False), quantise=False)
    tried = known.four_bit or four_bit_works(options.device, cache_dir())
    if tried.ok:
        return Decision(choose(True), quantise=True, four_bit=tried)
    if not tried.importable and not options.isolate:
        # PEFT imports bitsandbytes wherever it finds it, quantised or not; None is Python's own mark for a
        # module that is not to be found.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    notice = f"4-bit training does not work here: {tried.reason}"
    try:
        unquantised = choose(False, eight_bit=False)
    except InputError as error:
        raise InputError(f"{notice}; unquantised, {error}; `edge-sdk doctor` says what mends it") from error
    notice += "; training goes on unquantised"
    return Decision(unquantised, False, notice, bitsandbytes=tried.importable, four_bit=tried)


def choose_rank(
    federation: Federation,
    options: Options,
    quantise: bool,
    known: Known = Known(),
    ladder: Sequence[Ranks] | None = None,
    carried: int | None = None,
) -> choice.RankChoice:
    """How to train: the largest rank of the ladder that this device carries, with the base in 4 bits or not.

    Raises:
        InputError: not even the smallest fits; says what it needs and what would help.
    """
    to_carry = federation.rank_cap if federation.carries else 0
    return choice.choose(
        facts_of(federation, options),
        federation.training,
        ladder or ladder_of(federation, options),
        choice.Carry(to_carry if carried is None else carried, settled=carried is not None),
        choice.Limits(
            min(budget_bytes(options), known.most_bytes or sys.maxsize),
            federation.lease_s,
            known.link.upload_bytes_s,
            known.link.download_bytes_s,
            federation.upload_dtype,
            federation.download_dtype,
        ),
        choice.Device(placement(options, quantise, known), known.times, known.correction, known.eight_bit),
        known.longest,
    )


def predicted_bytes(federation: Federation, options: Options, quantise: bool, setting: Setting) -> int:
    """The uncorrected prediction for a setting, without what the libraries take."""
    return estimate(facts_of(federation, options), setting, placement(options, quantise, Known())).peak_bytes


def facts_of(federation: Federation, options: Options) -> ModelFacts:
    """What the predictions need to know of the federation's base."""
    return facts_from_config(read_config(resolve(model_of(federation, options))), federation.base.modules)


def placement(options: Options, quantise: bool, known: Known) -> Placement:
    """Where and how this device computes."""
    from edge_sdk.model import base_model

    place = base_model.placement(options.device, quantise)
    return replace(place, framework_bytes=known.framework_bytes)


def ladder_of(federation: Federation, options: Options) -> list[Ranks]:
    """The ranks that this device may choose from: its own wish alone, or all of the federation's.

    Raises:
        InputError: the wish is above the federation's ladder.
    """
    ladder = [Ranks.uniform(rank) for rank in federation.ladder]
    ladder += [Ranks(attention, mlp) for attention, mlp in federation.mixed_ranks]
    if options.ranks is None:
        return ladder
    most = max(ranks.largest for ranks in ladder)
    if options.ranks.largest > most:
        raise InputError(f"rank {options.ranks} is above the federation's ladder, which ends at {most}")
    return [options.ranks]


def budget_bytes(options: Options) -> int:
    """What training may take: the owner's word, or half of what is free now.

    Raises:
        InputError: the owner's word is more than the machine has.
    """
    device = options.profile or probe(quick=True)
    free = device.trainable_memory_bytes()
    if options.memory_budget_bytes is None:
        return int(free * BUDGET_SHARE)
    total = device.trainable_memory_total_bytes()
    if options.memory_budget_bytes > total:
        raise InputError(
            f"memory budget {human_bytes(options.memory_budget_bytes)} is more than {device.name} has: "
            f"{human_bytes(total)}"
        )
    return options.memory_budget_bytes
