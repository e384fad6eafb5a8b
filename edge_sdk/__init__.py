"""Federated LoRA fine-tuning on devices of unequal memory.

    from edge_sdk import Agent, Options

    agent = Agent("flexlora+https://host:8765/#…", data="notes.jsonl", options=Options(threads=4))

These names are what an application imports. Where they are inside the package is free to change. Importing it
loads nothing else: each name, most of which need the `edge` extra, is loaded on first use.

Of the errors (see `edge_sdk.core.errors`) these reach an application from the methods of `Agent`: the root,
the two branches that say whose fault it is, and those that it may want to answer differently. All others are
dealt with by the agent itself, or told as an `Event`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_sdk.core.version import __version__

if TYPE_CHECKING:
    from edge_sdk.agent import Agent
    from edge_sdk.callbacks import Callbacks
    from edge_sdk.conditions import Conditions
    from edge_sdk.core.errors import (
        BaseMismatch,
        EdgeError,
        InputError,
        OurFault,
        OutOfMemory,
        TheirFault,
        Unauthorised,
        Unreachable,
        WorkerDied,
    )
    from edge_sdk.options import Event, Limits, Options

__all__ = [
    "Agent",
    "BaseMismatch",
    "Callbacks",
    "Conditions",
    "EdgeError",
    "Event",
    "InputError",
    "Limits",
    "Options",
    "OurFault",
    "OutOfMemory",
    "TheirFault",
    "Unauthorised",
    "Unreachable",
    "WorkerDied",
    "__version__",
]

_ELSEWHERE = {
    "Agent": "edge_sdk.agent",
    "Callbacks": "edge_sdk.callbacks",
    "Conditions": "edge_sdk.conditions",
    "Event": "edge_sdk.options",
    "Limits": "edge_sdk.options",
    "Options": "edge_sdk.options",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")
    found = getattr(importlib.import_module(_ELSEWHERE.get(name, "edge_sdk.core.errors")), name)
    globals()[name] = found  # the next time it is simply there
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
