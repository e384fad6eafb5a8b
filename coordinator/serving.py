"""Adapters on their way out: one immutable file for each (version, rank), made at its first request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.rules import served
from coordinator.store import Store
from edge_sdk.core import codec
from edge_sdk.core.errors import NotFound
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation


class Serving:
    """Makes and finds the files that devices start from."""

    def __init__(self, federation: Federation, store: Store, blobs: Blobs) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs
        self._making: dict[str, asyncio.Lock] = {}

    def require(self, version: int, rank: int, current: int) -> None:
        """Raise NotFound for a version or rank that is not served; `current` is the newest version."""
        if not 0 <= version <= current:
            raise NotFound(f"version {version} does not exist; the current one is {current}")
        if not 1 <= rank <= self._federation.rank_cap:
            raise NotFound(f"rank {rank} is not served; 1 to {self._federation.rank_cap} are")

    async def adapter(self, version: int, rank: int) -> Path:
        """The file that a device of `rank` starts `version` from."""
        name = served_name(self._federation, version, rank)
        lock = self._making.setdefault(name, asyncio.Lock())
        async with lock:
            path = self._blobs.cached(name)
            if not path.exists():
                stored = self._store.version(version)
                current = self._blobs.path(stored.digest) if stored else None
                path = await asyncio.to_thread(
                    write_served, self._federation, version, current, rank, self._blobs
                )
        self._making.pop(name, None)
        return path


def served_name(federation: Federation, version: int, rank: int) -> str:
    """The name of that file in the cache."""
    return f"{federation.id}-{version}-{rank}.safetensors"


def write_served(federation: Federation, version: int, current: Path | None, rank: int, blobs: Blobs) -> Path:
    """Make the file that devices of `rank` start version `version` from; the same bytes for everyone.

    `current` is that version's global adapter, None for version 0.
    """
    shapes = federation.base.modules
    ranks = {name: min(rank, *shape) for name, shape in shapes.items()}

    def modules() -> Iterator[tuple[str, LoraFactors]]:
        own = codec.open_own(current, federation.scaling) if current else None
        for name in sorted(shapes):
            stored = own.module(name) if own else LoraFactors.empty(*shapes[name])
            yield name, served(federation, version, name, stored, ranks[name])

    chunks = codec.encode_chunks(shapes, ranks, federation.scaling, modules())
    return blobs.write_cached(served_name(federation, version, rank), chunks)


def export(
    federation: Federation, blobs: Blobs, version: int, current: Path | None, rank: int, out: Path
) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads."""
    source = write_served(federation, version, current, rank, blobs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_model.safetensors").write_bytes(source.read_bytes())
    config = codec.peft_config(federation.base.model, federation.base.modules, rank, federation.scaling)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
