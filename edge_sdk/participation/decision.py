"""What a device decides before it works: its memory budget, whether in 4 bits, and the rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edge_sdk.connection.link_speed import LinkSpeed
from edge_sdk.core.choice.memory import Placement, estimate, human_bytes
from edge_sdk.core.choice.model_facts import ModelFacts, facts_from_config
from edge_sdk.core.choice.rank import Carry, Device, Limits, RankChoice, choose
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.choice.step_time import StepTime
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Federation
from edge_sdk.machine.probe import probe
from edge_sdk.membership.identity import model_of
from edge_sdk.model.files import read_config, resolve
from edge_sdk.options import Options, cache_dir
from edge_sdk.system.hidden_library import hide_bitsandbytes
from edge_sdk.trials.four_bit import FourBitTrial, four_bit_works

BUDGET_SHARE = 0.5  # of the memory that is free now: the rest stays the owner's


@dataclass(frozen=True)
class Known:
    """What this device has measured of itself. The defaults stand for: not measured."""

    framework_bytes: int = 0
    times: StepTime | None = None
    correction: float = 1.0
    link: LinkSpeed = field(default_factory=LinkSpeed)
    longest: int | None = None  # tokens of the longest local example
    eight_bit: bool = True  # whether 8-bit moments can be had
    four_bit: FourBitTrial | None = None  # how a trial went that need not be made again
    most_bytes: int | None = None  # below the budget, where training has failed within that


@dataclass(frozen=True)
class Decision:
    """How this device will train. `notice`: why it does not quantise although it was wished; else empty."""

    choice: RankChoice
    quantise: bool
    notice: str = ""
    bitsandbytes: bool = True  # False: a process that imports it may die of that
    four_bit: FourBitTrial | None = None  # how the trial went, where there was one


@dataclass(frozen=True)
class Quantisation:
    """Whether the base is held in 4 bits; `notice`: why not, where that was wished and does not work here."""

    four_bit: bool
    notice: str = ""
    trial: FourBitTrial | None = None  # how it went, where there was one


def quantisation(options: Options, known: FourBitTrial | None = None) -> Quantisation:
    """In 4 bits where the owner wants that and it works on this device; a `known` trial is not repeated.

    Where bitsandbytes cannot even be imported it is hidden from this process, if that is to train.
    """
    if not options.quantise:
        return Quantisation(four_bit=False)
    trial = known or four_bit_works(options.device, cache_dir())
    if trial.ok:
        return Quantisation(True, trial=trial)
    if not trial.importable and not options.isolate:
        hide_bitsandbytes()
    return Quantisation(False, f"4-bit training does not work here: {trial.reason}", trial)


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

    def ranked(quantise: bool, eight_bit: bool = True) -> RankChoice:
        own = replace(known, eight_bit=eight_bit)
        return choose_rank(federation, options, quantise, own, ladder, carried)

    found = quantisation(options, known.four_bit)
    trial = found.trial
    if trial is None or trial.ok:
        return Decision(ranked(found.four_bit), found.four_bit, four_bit=trial)
    notice = found.notice
    try:
        unquantised = ranked(False, eight_bit=False)
    except InputError as error:
        raise InputError(f"{notice}; unquantised, {error}; `edge-sdk doctor` says what mends it") from error
    notice += "; training goes on unquantised"
    return Decision(unquantised, False, notice, bitsandbytes=trial.importable, four_bit=trial)


def choose_rank(
    federation: Federation,
    options: Options,
    quantise: bool,
    known: Known = Known(),
    ladder: Sequence[Ranks] | None = None,
    carried: int | None = None,
) -> RankChoice:
    """How to train: the largest rank of the ladder that this device carries, with the base in 4 bits or not.

    Raises:
        InputError: not even the smallest fits; says what it needs and what would help.
    """
    to_carry = federation.rank_cap if federation.carries else 0
    return choose(
        facts_of(federation, options),
        federation.training,
        ladder or ladder_of(federation, options),
        Carry(to_carry if carried is None else carried, settled=carried is not None),
        Limits(
            min(budget_bytes(options), known.most_bytes or sys.maxsize),
            federation.lease_s,
            known.link.upload_bytes_s,
            known.link.download_bytes_s,
            federation.upload_dtype,
            federation.download_dtype,
        ),
        Device(placement(options, quantise, known), known.times, known.correction, known.eight_bit),
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
