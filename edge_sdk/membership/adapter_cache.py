"""The published versions of the global adapter, on this device: downloaded at most once, old ones removed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, ProtocolError, TooLarge, Unreachable
from edge_sdk.core.lora import Adapter
from edge_sdk.membership.membership import Membership
from edge_sdk.system.durable import make_folder, unwritable

Purpose = Literal["work", "answer"]  # to train from, and to answer with
SUFFIX = ".safetensors"
START = re.compile(r"[0-9a-f]{0,64}")


@dataclass(frozen=True, order=True)
class AdapterKey:
    """A version at a rank; rank 0 changes nothing and has no file.

    `start` tells two versions of one number apart, as there are after a coordinator was restored from an
    older copy; "" from a coordinator that does not say.
    """

    version: int = 0
    rank: int = 0
    start: str = ""

    def __post_init__(self) -> None:
        if not START.fullmatch(self.start):
            raise ProtocolError(f"start {self.start[:40]!r} is not the beginning of a SHA-256 in hex")

    def replaces(self, other: AdapterKey) -> bool:
        """Whether `other` is of a history that was lost, if this is the newest version."""
        return other.version > self.version or (other.version == self.version and other.start != self.start)


class AdapterCache:
    """Adapter files of one federation in a folder. Used from any thread; one download at a time.

    Args:
        membership: whose adapters.
        folder: where they lie, as `{federation}-{version}-{rank}[-{start}].safetensors`.
    """

    def __init__(self, membership: Membership, folder: Path) -> None:
        self._membership, self._folder = membership, folder
        self._wanted: dict[Purpose, str] = {}
        self._downloading = threading.Lock()

    def fetch(self, key: AdapterKey, purpose: Purpose) -> Adapter:
        """A version at a rank.

        Raises:
            Unreachable, NotFound: it is not here and cannot be had.
        """
        path = self.have(key, purpose)
        return dict(codec.open_own(path, self._membership.federation.scaling).modules())

    def have(self, key: AdapterKey, purpose: Purpose, stopping: Callable[[], bool] | None = None) -> Path:
        """Its file, downloaded if it is not here. What no purpose wants any more goes, but for the newest.

        Raises:
            Unreachable, NotFound: it cannot be had.
            Unwritable: the disk is full.
            TransferStopped: `stopping` said so.
        """
        path = self._folder / self._name(key)
        with self._downloading:
            if not _is_sound(path):
                self._download(key, path, stopping)
            if self._wanted.get(purpose) != path.name:
                self._wanted[purpose] = path.name
                self._forget()
        return path

    def heard(self, newest: AdapterKey) -> None:
        """Forget the versions of a history that the coordinator lost; `newest` is what it has now."""
        with self._downloading:
            for path, other in list(self._files()):
                if newest.replaces(other) and path.name != self._wanted.get("work"):
                    path.unlink(missing_ok=True)

    def newest_on_disk(self) -> AdapterKey:
        """The newest file here, of the largest rank; version 0 without any."""
        return max((key for _, key in self._files()), default=AdapterKey())

    def _download(self, key: AdapterKey, path: Path, stopping: Callable[[], bool] | None) -> None:
        try:
            make_folder(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        federation = self._membership.federation
        if key.rank > federation.rank_cap:
            raise Unreachable(f"version {key.version} has rank {key.rank}, above {federation.rank_cap}")
        dtype = federation.download_dtype
        most_bytes = codec.max_adapter_bytes(federation.base.modules, key.rank, dtype)
        if most_bytes > (allowed := self._membership.options.limits.most_download_bytes):
            raise Unreachable(
                f"version {key.version} at rank {key.rank} may have {most_bytes} bytes, more than the "
                f"{allowed} that this device's owner allows"
            )
        download = self._membership.transport.download
        download(key.version, key.rank, path, stopping, dtype, most_bytes=most_bytes)

    def _forget(self) -> None:
        newest = max(self._files(), key=lambda file: file[1], default=(None,))[0]
        for path in self._folder.iterdir():
            if path.name not in self._wanted.values() and path != newest:
                path.unlink(missing_ok=True)

    def _name(self, key: AdapterKey) -> str:
        end = f"-{key.start}" if key.start else ""
        return f"{self._membership.federation.id}-{key.version}-{key.rank}{end}{SUFFIX}"

    def _files(self) -> Iterator[tuple[Path, AdapterKey]]:
        """Whole files of this federation; a partial download ends otherwise."""
        named = re.compile(
            rf"{re.escape(self._membership.federation.id)}-(\d+)-(\d+)(?:-([0-9a-f]+))?{re.escape(SUFFIX)}"
        )
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if found := named.fullmatch(path.name):
                yield path, AdapterKey(int(found.group(1)), int(found.group(2)), found.group(3) or "")


def _is_sound(path: Path) -> bool:
    """Whether a file is here and as long as its header says: a power cut may have left another."""
    try:
        codec.require_length(path)
    except (FileNotFoundError, AdapterError, TooLarge):
        return False
    return True
