"""Adapters on their way out: immutable files for each (version, rank, dtype).

Those that devices will ask for are made before their version is published: one that cannot be served must
not become the current one, from which everybody starts. Any of them may be removed again, by a start or where
nobody needs it, and is then made at the next request, with all others that devices ask for (docs/WIRE.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from coordinator.adapters.ladder import Rung, file_name, rungs, write_rungs
from coordinator.storage.blobs import Blobs
from coordinator.storage.store import Store
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, InputError, InternalError, NotFound
from edge_sdk.core.messages import Federation
from edge_sdk.system.durable import FOR_OTHERS, Step, fsync_folder, replacing

MOST_UNUSUAL = 8  # files at a time of ranks or dtypes that no device of a federation trains from


class Serving:
    """Makes and finds the files that devices start from.

    Args:
        federation, store, blobs: of the data folder.
        newest: so many versions are kept, whoever needs them.
        require_room: raises DiskFull where no file may be made because somebody asks for it.
    """

    def __init__(
        self,
        federation: Federation,
        store: Store,
        blobs: Blobs,
        newest: int,
        require_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._federation, self._store, self._blobs = federation, store, blobs
        self._newest, self._require_room = newest, require_room
        self._unusual: deque[str] = deque()  # files of ranks or dtypes that no device trains from
        self._making: dict[int, asyncio.Lock] = {}
        self._asking: Counter[int] = Counter()  # who waits for a version's lock, or holds it

    def require(self, version: int, rank: int, current: int) -> None:
        """Raise NotFound for a version or rank that is not served; `current` is the newest version."""
        if not 0 <= version <= current:
            raise NotFound(f"version {version} does not exist; the current one is {current}")
        if (stored := self._store.version(version)) and stored.collected:
            raise NotFound(collected(version, self._newest))
        if not 1 <= rank <= self._federation.rank_cap:
            raise NotFound(f"rank {rank} is not served; 1 to {self._federation.rank_cap} are")

    def holding(self, version: int, rung: Rung) -> contextlib.AbstractContextManager[None]:
        """Keeps that file from being collected while the block runs."""
        return self._blobs.pins.hold(self._path(version, rung).name)

    async def adapter(self, version: int, rung: Rung) -> Path:
        """The file that a device of that rank starts `version` from, in that dtype."""
        path = self._path(version, rung)
        self._asking[version] += 1
        try:
            async with self._making.setdefault(version, asyncio.Lock()):
                if not path.exists():
                    self._require_room()
                    await asyncio.to_thread(self._make, version, rung)
        finally:
            self._asking[version] -= 1
            if not self._asking[version]:  # a lock that somebody waits for must stay the only one
                del self._asking[version], self._making[version]
        return path

    def prepare(self, version: int, digest: str, live_rank: int) -> None:
        """Make the files of a version that is about to be published, and read the largest.

        All are cut from that one. For the thread that merges. A version of that number which was not
        published may have left files: they are replaced.

        Args:
            version: its number.
            digest: of its stored adapter.
            live_rank: of that.

        Raises:
            InternalError: devices could not be given what was merged; says why.
        """
        ladder = rungs(self._federation, live_rank)
        if not ladder:  # there is nothing that devices would hold
            return
        try:
            write_rungs(self._federation, version, self._blobs.path(digest), ladder, self._blobs.caching)
            codec.require_whole(self._path(version, max(ladder)))
        except FileNotFoundError:
            return  # collected, since nobody starts from it yet: it is made again when it is asked for
        except AdapterError as error:
            raise InternalError(f"version {version} could not be served: {error}") from error

    def _make(self, version: int, rung: Rung) -> None:
        """Make this file; if it is one of those that devices ask for, all of them that are not there."""
        stored = self._store.version(version)
        current = self._blobs.path(stored.digest) if stored else None
        ladder = rungs(self._federation, stored.rank if stored else 0)
        wanted = ladder if rung in ladder else (rung,)
        missing = [one for one in wanted if not self._path(version, one).exists()]
        try:
            with self._blobs.pins.hold(*([stored.digest] if stored else [])):
                if stored:
                    self._blobs.require_published(stored.digest, version)
                write_rungs(self._federation, version, current, missing, self._blobs.caching)
            if rung not in ladder:
                self._keep_few(self._path(version, rung).name)
        except AdapterError as error:  # not the fault of the device that asks
            raise InternalError(f"version {version} cannot be had in {rung.dtype}: {error}") from error

    def _keep_few(self, name: str) -> None:
        """Note a file that no device of this federation trains from, and remove the oldest of too many.

        Whoever has a credential may ask for any rank in any dtype; such a file can be made again.
        """
        self._unusual.append(name)
        for _ in range(len(self._unusual) - MOST_UNUSUAL):
            oldest = self._unusual.popleft()
            remove = partial(self._blobs.cached(oldest).unlink, missing_ok=True)
            if not self._blobs.pins.remove(oldest, lambda: False, remove):
                self._unusual.append(oldest)  # it is being sent; its turn comes again

    def _path(self, version: int, rung: Rung) -> Path:
        return self._blobs.cached(file_name(self._federation, version, rung))


def collected(version: int, newest: int) -> str:
    """What to tell who asks for a version whose file is gone."""
    return f"version {version} was collected; the {newest} newest are kept"


def export(federation: Federation, version: int, current: Path | None, rank: int, out: Path) -> None:
    """Write a PEFT adapter folder that `PeftModel.from_pretrained` loads: float32, whatever devices get.

    A crash or a full disk leaves the adapter that was there, the new one, or for a moment in between a folder
    without a configuration, which no loader takes for an adapter.

    Raises:
        InputError: `out` cannot be written; says why.
    """
    adapter, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    said = codec.peft_config(federation.base.model, federation.base.modules, rank, federation.scaling)

    def parted(step: Step) -> None:
        if step == "written":  # what follows would not fit the old configuration
            config.unlink(missing_ok=True)
            fsync_folder(out)

    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(config, mode=FOR_OTHERS) as file:
            file.write(json.dumps(said, indent=1).encode() + b"\n")
            write_rungs(
                federation,
                version,
                current,
                [Rung(rank)],
                lambda _: replacing(adapter, mode=FOR_OTHERS, at=parted),
            )
    except OSError as error:
        raise InputError(f"{out}: the adapter cannot be written ({error.strerror or error})") from error
