"""Adapters on their way out: immutable files for each (version, rank, dtype), made at the first request.

At the first request for one rank that devices ask for, the files of all such ranks are made. Not when a
version is published: one that nobody fetches, because the next came before, costs nothing then, a crash
leaves nothing to be taken up, and who comes first waits little longer than for one file (docs/WIRE.md).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from coordinator.blobs import Blobs
from coordinator.ladder import Rung, file_name, rungs, write_rungs
from coordinator.store import Store
from edge_sdk.core import codec
from edge_sdk.core.errors import AdapterError, InternalError, NotFound
from edge_sdk.core.messages import Federation


class Serving:
    """Makes and finds the files that devices start from."""

    def __init__(self, federation: Federation, store: Store, blobs: Blobs) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs
        self._making: dict[int, asyncio.Lock] = {}

    def require(self, version: int, rank: int, current: int) -> None:
        """Raise NotFound for a version or rank that is not served; `current` is the newest version."""
        if not 0 <= version <= current:
            raise NotFound(f"version {version} does not exist; the current one is {current}")
        if not 1 <= rank <= self._federation.rank_cap:
            raise NotFound(f"rank {rank} is not served; 1 to {self._federation.rank_cap} are")

    async def adapter(self, version: int, rung: Rung) -> Path:
        """The file that a device of that rank starts `version` from, in that dtype."""
        path = self._path(version, rung)
        async with self._making.setdefault(version, asyncio.Lock()):
            if not path.exists():
                await asyncio.to_thread(self._make, version, rung)
        self._making.pop(version, None)
        return path

    def _make(self, version: int, rung: Rung) -> None:
        """Make this file; if it is one of those that devices ask for, all of them that are not there."""
        stored = self._store.version(version)
        current = self._blobs.path(stored.digest) if stored else None
        ladder = rungs(self._federation, stored.rank if stored else 0)
        wanted = ladder if rung in ladder else (rung,)
        missing = [one for one in wanted if not self._path(version, one).exists()]
        try:
            write_rungs(self._federation, version, current, missing, self._blobs)
        except AdapterError as error:  # not the fault of the device that asks
            raise InternalError(f"version {version} cannot be had in {rung.dtype}: {error}") from error

    def _path(self, version: int, rung: Rung) -> Path:
        return self._blobs.cached(file_name(self._federation, version, rung))


def export(
    federation: Federation, blobs: Blobs, version: int, current: Path | None, rank: int, out: Path
) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads: float32, whatever devices get."""
    rung = Rung(rank)
    write_rungs(federation, version, current, [rung], blobs)
    out.mkdir(parents=True, exist_ok=True)
    source = blobs.cached(file_name(federation, version, rung))
    (out / "adapter_model.safetensors").write_bytes(source.read_bytes())
    config = codec.peft_config(federation.base.model, federation.base.modules, rank, federation.scaling)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
