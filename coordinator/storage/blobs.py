"""Files by the SHA-256 of their content, and the half-finished uploads that become them.

    blobs/3f/3fa4…      immutable; written beside, fsynced, renamed, and the folder fsynced
    uploads/{id}.part   bytes received so far, appended at their end only
    cache/{name}        derived files that can be made again; atomic, but not fsynced

Nothing above this module knows that it is a disk; an object store goes behind the same methods. Where the
disk is full or fails, DiskFull or InternalError names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from coordinator.storage.disk import blaming, write_all
from coordinator.storage.failpoints import reach
from coordinator.storage.pins import Pins
from coordinator.storage.running_digests import RunningDigests
from edge_sdk.core.adapter_file.codec import sha256_file
from edge_sdk.core.errors import InternalError, OffsetConflict, ProtocolError, TooLarge, UploadLost
from edge_sdk.system.durable import Step, fsync_file, fsync_folder, make_folder, privately, replacing

Writer = Callable[[Iterable[bytes]], str]
"""Stores a blob durably and returns its digest."""


class Blobs:
    """A folder of blobs, uploads and cached files. `pins` keeps blobs and cached files from being removed."""

    def __init__(self, folder: Path) -> None:
        self.pins = Pins()
        self._blobs, self._uploads, self._cache = folder / "blobs", folder / "uploads", folder / "cache"
        for part in (self._blobs, self._uploads, self._cache):
            make_folder(part)
        # An upload is written by one thread at a time; ids share locks, so that there are not ever more.
        self._locks = [threading.Lock() for _ in range(64)]
        self._digests = RunningDigests()
        self._durable_folders: set[Path] = set()  # whose names this process has seen on disk

    def path(self, digest: str) -> Path:
        """Where the blob of this digest lies or would lie."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ProtocolError(f"{digest[:80]!r} is not a SHA-256 in lower-case hex")
        return self._blobs / digest[:2] / digest

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is there with the bytes that it was stored with; reads all of it."""
        path = self.path(digest)
        with blaming(_shown(path)):
            return path.exists() and sha256_file(path) == digest

    def require_published(self, digest: str, version: int) -> None:
        """Raise InternalError unless the blob of a version has the bytes that it was published with."""
        if not self.is_intact(digest):
            raise InternalError(
                f"version {version} is not what was published: {_shown(self.path(digest))} is damaged or "
                "gone; its host must restore it from a backup"
            )

    def write(self, chunks: Iterable[bytes], keep: contextlib.ExitStack | None = None) -> str:
        """Store a blob durably and return its digest. Until `keep` is closed it is not collected."""
        temporary = self._uploads / f".write-{os.getpid()}-{os.urandom(6).hex()}"
        digest = hashlib.sha256()
        with blaming(_shown(temporary)):
            try:
                with open(temporary, "xb", opener=privately) as file:
                    for chunk in chunks:
                        digest.update(chunk)
                        file.write(chunk)
                if keep:
                    keep.enter_context(self.pins.hold(digest.hexdigest()))
                return self._adopt(temporary, digest.hexdigest())
            finally:
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[Writer]:
        """What writes blobs of which none is collected before the block ends, when rows name them."""
        with contextlib.ExitStack() as keep:
            yield partial(self.write, keep=keep)

    def cached(self, name: str) -> Path:
        """Where the derived file `name` lies or would lie."""
        return self._cache / name

    @contextlib.contextmanager
    def caching(self, name: str) -> Iterator[BinaryIO]:
        """Write a derived file so that readers see all of it or none: all, if the block ends well."""
        path = self.cached(name)
        with blaming(_shown(path)), replacing(path, lasting=False, at=_cached) as file:
            yield file

    # --- uploads ---

    def upload_path(self, id: str) -> Path:
        """The file of an upload. `id` is one of our own making; anything else is refused."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id):
            raise ProtocolError(f"{id[:80]!r} is not an upload id")
        return self._uploads / f"{id}.part"

    def offset(self, id: str) -> int:
        """Bytes stored of an upload."""
        path = self.upload_path(id)
        with blaming(_shown(path)):
            return path.stat().st_size if path.exists() else 0

    def append(self, id: str, offset: int, chunk: bytes | Sequence[bytes], cap_bytes: int) -> int:
        """Append bytes, or pieces of them, at `offset`, where the stored bytes must end; returns the new end.

        Raises:
            OffsetConflict: bytes are missing before `offset`, or there already.
            TooLarge: the upload would exceed its cap; nothing is written.
            DiskFull, InternalError: some of the chunk may be stored; `offset` says how much.
        """
        pieces = [chunk] if isinstance(chunk, bytes) else chunk
        size_bytes = sum(map(len, pieces))
        path = self.upload_path(id)
        with blaming(_shown(path)), self._lock(id):
            with open(path, "ab", buffering=0, opener=privately) as file:
                end = file.tell()
                if offset != end:
                    raise OffsetConflict(
                        f"{end} bytes are stored; continue there, not at {offset}", offset=end
                    )
                if end + size_bytes > cap_bytes:
                    raise TooLarge(f"the upload exceeds the {cap_bytes} bytes that its rank needs")
                write_all(file, pieces)
            self._digests.extend(id, offset, pieces)
            reach("upload-appended")
        return end + size_bytes

    def whole(self, id: str, digest: str) -> Path:
        """Where the bytes of a finished upload can be read before it becomes a blob, or because it is one.

        Raises:
            UploadLost: the bytes have another digest; they are dropped, so that the upload can restart.
        """
        with blaming(_shown(self.upload_path(id))), self._lock(id):
            return self._whole(id, digest)

    def finish(self, id: str, digest: str) -> Path:
        """Turn a whole upload into a blob, durably; the blob's path. Doing it twice is the same as once.

        Raises:
            UploadLost: as `whole`.
        """
        blob, upload = self.path(digest), self.upload_path(id)
        with blaming(_shown(upload)), self._lock(id):
            if self._whole(id, digest) == blob:
                self._make_name_durable(blob)  # a crash may have come just before that
                upload.unlink(missing_ok=True)
            else:
                self._adopt(upload, digest)
            self._digests.forget(id)
        return blob

    def _whole(self, id: str, digest: str) -> Path:
        blob, upload = self.path(digest), self.upload_path(id)
        if blob.exists():
            return blob
        if not upload.exists():
            raise UploadLost("nothing was uploaded for this assignment; send the adapter first")
        actual = self._digests.of(id, upload.stat().st_size) or sha256_file(upload)
        if actual != digest:
            self.discard(id)
            raise UploadLost(
                f"the uploaded bytes have SHA-256 {actual[:12]}…, not {digest[:12]}…; upload again"
            )
        return upload

    def _lock(self, id: str) -> threading.Lock:
        return self._locks[zlib.crc32(id.encode(errors="replace")) % len(self._locks)]

    def discard(self, id: str) -> None:
        """Forget an upload."""
        path = self.upload_path(id)
        if path.exists():
            with blaming(_shown(path)):
                path.unlink(missing_ok=True)
                reach("upload-dropped")

    # --- durably ---

    def _adopt(self, file: Path, digest: str) -> str:
        """Move a complete file into its place: bytes first, then the name, then the folder's own entry."""
        try:
            reach("blob-written")
            fsync_file(file)
        except OSError:
            # What a failed fsync lost can still be read, from memory, and the next one says that all is well.
            with contextlib.suppress(OSError):
                file.unlink()
            raise
        reach("blob-fsynced")
        target = self.path(digest)
        if target.parent not in self._durable_folders:
            make_folder(target.parent)
            reach("blob-folder-made")
        file.replace(target)
        reach("blob-renamed")
        self._make_name_durable(target)
        return digest

    def _make_name_durable(self, blob: Path) -> None:
        if blob.parent not in self._durable_folders:
            fsync_folder(self._blobs)
        fsync_folder(blob.parent)
        self._durable_folders.add(blob.parent)
        reach("blob-folder-fsynced")

    # --- for collection ---

    def digests(self) -> Iterator[str]:
        """Of all blobs, in no order."""
        for path in self._blobs.glob("[0-9a-f][0-9a-f]/*"):
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                yield path.name

    def cached_names(self) -> list[str]:
        """Of the derived files that are there."""
        return [path.name for path in self._cache.iterdir() if not path.name.startswith(".")]

    def upload_ids(self) -> list[str]:
        """Of the uploads of which bytes are there."""
        return [path.stem for path in self._uploads.glob("*.part")]

    def temporaries(self) -> list[Path]:
        """Files that a killed process was writing, if no other is at it now."""
        return [path for folder in (self._uploads, self._cache) for path in folder.glob(".*")]


def _cached(step: Step) -> None:
    reach("cache-written" if step == "written" else "cache-renamed")


def _shown(path: Path) -> str:
    """A file without the data folder, whose place is nobody's business."""
    return "/".join(path.parts[-2:])
