"""What a device finds out about itself before it works: the identity of its base model and its rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.core import memory
from edge_sdk.core.errors import BaseMismatch, InputError
from edge_sdk.core.facts import facts_from_config
from edge_sdk.core.messages import Federation, JoinRequest
from edge_sdk.model_files import read_config, resolve
from edge_sdk.options import Options, cache_dir
from edge_sdk.preflight import four_bit_works
from edge_sdk.probe import probe

BUDGET_SHARE = 0.5  # of the memory that is free now: the rest stays the owner's


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
    from edge_sdk import base_model

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

    choice: memory.RankChoice
    quantise: bool
    notice: str = ""


def decide(federation: Federation, options: Options) -> Decision:
    """The rank to train, in 4 bits where that works on this device, and otherwise unquantised if that fits.

    Raises:
        InputError: the memory is not enough, or would only be in 4 bits, which fail here; says why.
    """
    if not options.quantise:
        return Decision(choose_rank(federation, options, quantise=False), quantise=False)
    tried = four_bit_works(options.device, cache_dir())
    if tried.ok:
        return Decision(choose_rank(federation, options, quantise=True), quantise=True)
    if not tried.importable:
        # PEFT imports bitsandbytes wherever it finds it, quantised or not; None is Python's own mark for a
        # module that is not to be found.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    notice = f"4-bit training does not work here: {tried.reason}"
    try:
        choice = choose_rank(federation, options, quantise=False)
    except InputError as error:
        raise InputError(f"{notice}; unquantised, {error}; `edge-sdk doctor` says what mends it") from error
    return Decision(choice, quantise=False, notice=f"{notice}; training goes on unquantised")


def choose_rank(federation: Federation, options: Options, quantise: bool) -> memory.RankChoice:
    """The largest rank of the ladder that this device's memory carries, with the base in 4 bits or not.

    Raises:
        InputError: not even the smallest does; says what it needs and what would help.
    """
    from edge_sdk import base_model

    budget = options.memory_budget_bytes
    if budget is None:
        device = options.profile or probe(quick=True)
        budget = int(device.trainable_memory_bytes() * BUDGET_SHARE)
    return memory.choose_rank(
        facts_from_config(read_config(resolve(model_of(federation, options))), federation.base.modules),
        federation.training,
        federation.ladder,
        federation.rank_cap if federation.rule == "carry" else 0,
        budget,
        base_model.placement(options.device, quantise),
    )
