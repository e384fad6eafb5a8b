"""How a device introduces itself to a federation: its base model, what identifies that, and its hardware."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.core.errors import BaseMismatch, InputError
from edge_sdk.core.messages import Federation, JoinRequest
from edge_sdk.machine.probe import probe
from edge_sdk.model.files import resolve
from edge_sdk.options import Options, cache_dir


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
        found = base_model.describe(model, ",".join(federation.base.modules), digests)
    except InputError as error:
        raise BaseMismatch(
            f"{error}; the federation trains {federation.base.model}: load that model"
        ) from error
    if found.fingerprint == federation.base.fingerprint and found.modules != federation.base.modules:
        raise BaseMismatch(f"the coordinator says other shapes of modules than {federation.base.model} has")
    return found.fingerprint


def request(base: str, options: Options) -> JoinRequest:
    """How this device introduces itself; `base` is its model's fingerprint."""
    device = options.profile or probe(quick=True, folder=options.state_dir or cache_dir())
    return JoinRequest(options.name, base, device.summary())
