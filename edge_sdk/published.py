"""The published versions of the global adapter, on this device: downloaded at most once, old ones removed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edge_sdk.core import codec
from edge_sdk.core.lora import Adapter
from edge_sdk.membership import Membership

Purpose = Literal["work", "serve"]  # to train from, and to answer with
SUFFIX = ".safetensors"


class PublishedAdapters:
    """Adapter files of one federation in a folder. Used from any thread; one download at a time.

    Args:
        membership: whose adapters.
        folder: where they lie.
    """

    def __init__(self, membership: Membership, folder: Path) -> None:
        self._membership, self._folder = membership, folder
        self._wanted: dict[Purpose, str] = {}
        self._downloading = threading.Lock()

    def fetch(
        self, version: int, rank: int, purpose: Purpose, stopping: Callable[[], bool] | None = None
    ) -> Adapter:
        """A version at a rank.

        Raises:
            Unreachable, NotFound: it is not here and cannot be had.
            TransferStopped: `stopping` said so.
        """
        return self._read(self.have(version, rank, purpose, stopping))

    def have(
        self, version: int, rank: int, purpose: Purpose, stopping: Callable[[], bool] | None = None
    ) -> Path:
        """Its file, downloaded if it is not here. What no purpose wants any more goes, but for the newest."""
        name = f"{self._membership.federation.id}-{version}-{rank}{SUFFIX}"
        path = self._folder / name
        with self._downloading:
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                dtype = self._membership.federation.download_dtype
                self._membership.transport.download(version, rank, path, stopping, dtype)
            if self._wanted.get(purpose) != name:
                self._wanted[purpose] = name
                self._forget()
        return path

    def newest_on_disk(self) -> tuple[int, int]:
        """(version, rank) of the newest file here, of the largest rank; (0, 0) without any."""
        found = [self._place(path) for path in self._files()]
        return max(found, default=(0, 0))

    def _forget(self) -> None:
        newest = max(self._files(), key=self._place, default=None)
        for path in self._folder.iterdir():
            if path.name not in self._wanted.values() and path != newest:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Whole files of this federation; a partial download ends otherwise."""
        if not self._folder.is_dir():
            return []
        prefix = f"{self._membership.federation.id}-"
        return [p for p in self._folder.iterdir() if p.name.startswith(prefix) and p.name.endswith(SUFFIX)]

    def _place(self, path: Path) -> tuple[int, int]:
        version, rank = path.name.removesuffix(SUFFIX).rsplit("-", 2)[1:]
        return int(version), int(rank)

    def _read(self, path: Path) -> Adapter:
        return dict(codec.open_own(path, self._membership.federation.scaling).modules())
