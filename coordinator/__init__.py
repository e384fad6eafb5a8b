"""The coordinator of a federation: hands out work, takes in updates, publishes versions."""

from edge_sdk.core.version import __version__

__all__ = ["__version__"]
