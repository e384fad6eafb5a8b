"""How a device introduces itself to a federation: its base model, what identifies that, and its hardware."""

from __future__ import annotations

import re
from pathlib import Path

from edge_sdk.core.errors import BaseMismatch, InputError
from edge_sdk.core.messages import Federation, JoinRequest
from edge_sdk.machine.probe import probe
from edge_sdk.model.files import TINY, require_no_code, resolve
from edge_sdk.options import Options, cache_dir

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def model_of(federation: Federation, options: Options) -> str:
    """Where this device loads the base model from: its owner's choice, or what the federation names.

    A federation names `tiny` or a model of the Hugging Face hub. What lies on this machine is not for a
    stranger to name: a path may be a folder of somebody else's, or on a server that asks for a password.

    Raises:
        InputError: the federation names something else, or what could be a folder here.
    """
    named = federation.base.model
    if options.model or named == TINY:
        return options.model or TINY
    if not HUB_ID.fullmatch(named):
        raise InputError(
            f"the federation's base is {named[:80]!r}, which is neither {TINY!r} nor org/name on the Hugging "
            "Face hub; say where that model lies on this machine with --model"
        )
    if Path(named).exists():
        raise InputError(
            f"the federation's base is {named!r}, and there is a file or folder of that name here; say which "
            "you mean with --model"
        )
    return named


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
    # A model that is not there, or that must not be loaded, is no mismatch.
    require_no_code(resolve(model), options.trust_remote_code)
    try:
        targets, trust = ",".join(federation.base.modules), options.trust_remote_code
        found = base_model.describe(model, targets, digests, trust_remote_code=trust)
    except InputError as error:
        raise BaseMismatch(
            f"{error}; the federation trains {federation.base.model}: load that model"
        ) from error
    if found.fingerprint == federation.base.fingerprint and found.modules != federation.base.modules:
        raise BaseMismatch(f"the coordinator says other shapes of modules than {federation.base.model} has")
    return found.fingerprint


def request(base: str, options: Options, attempt: str) -> JoinRequest:
    """How this device introduces itself; `base` is its model's fingerprint, `attempt` as in JoinRequest."""
    device = options.profile or probe(quick=True, folder=options.state_dir or cache_dir())
    return JoinRequest(options.name, base, device.summary(), attempt=attempt)
