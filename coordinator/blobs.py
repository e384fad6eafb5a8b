"""Files by the SHA-256 of their content, and the half-finished uploads that become them.

    blobs/3f/3fa4…      immutable; written beside, fsynced, renamed, and the folder fsynced
    uploads/{id}.part   bytes received so far, appended at their end only
    cache/{name}        derived files that can be made again; atomic, but not fsynced

Nothing above this module knows that it is a disk; an object store goes behind the same methods.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from edge_sdk.core.codec import sha256_file
from edge_sdk.core.errors import OffsetConflict, ProtocolError, TooLarge, UploadLost


class Blobs:
    """A folder of blobs, uploads and cached files."""

    def __init__(self, folder: Path) -> None:
        self._blobs, self._uploads, self._cache = folder / "blobs", folder / "uploads", folder / "cache"
        for part in (self._blobs, self._uploads, self._cache):
            part.mkdir(parents=True, exist_ok=True)
        # An upload is written by one thread at a time; ids share locks, so that there are not ever more.
        self._locks = [threading.Lock() for _ in range(64)]

    def path(self, digest: str) -> Path:
        """Where the blob of this digest lies or would lie."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ProtocolError(f"{digest[:80]!r} is not a SHA-256 in lower-case hex")
        return self._blobs / digest[:2] / digest

    def is_intact(self, digest: str) -> bool:
        """Whether the blob is there with the bytes that it was stored with; reads all of it."""
        path = self.path(digest)
        return path.exists() and sha256_file(path) == digest

    def write(self, chunks: Iterable[bytes]) -> str:
        """Store a blob durably and return its digest."""
        temporary = self._uploads / f".write-{os.getpid()}-{os.urandom(6).hex()}"
        digest = hashlib.sha256()
        try:
            with temporary.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            return self._adopt(temporary, digest.hexdigest())
        finally:
            temporary.unlink(missing_ok=True)

    def cached(self, name: str) -> Path:
        """Where the derived file `name` lies or would lie."""
        return self._cache / name

    @contextlib.contextmanager
    def caching(self, name: str) -> Iterator[BinaryIO]:
        """Write a derived file so that readers see all of it or none: all, if the block ends well."""
        path = self.cached(name)
        temporary = path.with_name(f".{name}-{os.urandom(6).hex()}")
        try:
            with temporary.open("xb") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    # --- uploads ---

    def upload_path(self, id: str) -> Path:
        """The file of an upload. `id` is one of our own making; anything else is refused."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id):
            raise ProtocolError(f"{id[:80]!r} is not an upload id")
        return self._uploads / f"{id}.part"

    def offset(self, id: str) -> int:
        """Bytes stored of an upload."""
        path = self.upload_path(id)
        return path.stat().st_size if path.exists() else 0

    def append(self, id: str, offset: int, chunk: bytes, cap_bytes: int) -> int:
        """Append at `offset`, which must be where the stored bytes end; returns the new end.

        Raises:
            OffsetConflict: bytes are missing before `offset`, or there already.
            TooLarge: the upload would exceed its cap; nothing is written.
        """
        with self._lock(id), self.upload_path(id).open("ab") as file:
            end = file.tell()
            if offset != end:
                raise OffsetConflict(f"{end} bytes are stored; continue there, not at {offset}", offset=end)
            if end + len(chunk) > cap_bytes:
                raise TooLarge(f"the upload exceeds the {cap_bytes} bytes that its rank needs")
            file.write(chunk)
        return end + len(chunk)

    def whole(self, id: str, digest: str) -> Path:
        """Where the bytes of a finished upload can be read before it becomes a blob, or because it is one.

        Raises:
            UploadLost: the bytes have another digest; they are dropped, so that the upload can restart.
        """
        with self._lock(id):
            return self._whole(id, digest)

    def finish(self, id: str, digest: str) -> Path:
        """Turn a whole upload into a blob, durably; the blob's path. Doing it twice is the same as once.

        Raises:
            UploadLost: as `whole`.
        """
        blob = self.path(digest)
        with self._lock(id):
            if self._whole(id, digest) == blob:
                self.upload_path(id).unlink(missing_ok=True)
            else:
                self._adopt(self.upload_path(id), digest)
        return blob

    def _whole(self, id: str, digest: str) -> Path:
        blob, upload = self.path(digest), self.upload_path(id)
        if blob.exists():
            return blob
        if not upload.exists():
            raise UploadLost("nothing was uploaded for this assignment; send the adapter first")
        actual = sha256_file(upload)
        if actual != digest:
            upload.unlink()
            raise UploadLost(
                f"the uploaded bytes have SHA-256 {actual[:12]}…, not {digest[:12]}…; upload again"
            )
        return upload

    def _lock(self, id: str) -> threading.Lock:
        return self._locks[zlib.crc32(id.encode(errors="replace")) % len(self._locks)]

    def discard(self, id: str) -> None:
        """Forget an upload."""
        self.upload_path(id).unlink(missing_ok=True)

    def _adopt(self, file: Path, digest: str) -> str:
        """Move a complete file into its place: bytes first, then the name, then the folder's own entry."""
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        target = self.path(digest)
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            _fsync_folder(self._blobs)
        file.replace(target)
        _fsync_folder(target.parent)
        return digest


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
