"""The host's choice of what is kept on the disk."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.core.errors import InputError


@dataclass(frozen=True)
class Storage:
    """`[storage]`. Versions that a device may still need are kept besides."""

    keep_versions: int = 20  # the newest, which can be exported

    def __post_init__(self) -> None:
        if self.keep_versions < 1:
            raise InputError(f"storage.keep_versions is {self.keep_versions}; it must be 1 or more")
