"""Federated LoRA fine-tuning on devices of unequal memory.

    from edge_sdk import Agent

Importing this package loads nothing else: `Agent`, which needs the `edge` extra, is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.agent import Agent

__version__ = "0.1.0"
__all__ = ["Agent", "__version__"]


def __getattr__(name: str) -> Any:
    """Load `Agent` on first use (PEP 562)."""
    if name == "Agent":
        from edge_sdk.agent import Agent

        return Agent
    raise AttributeError(f"module 'edge_sdk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
