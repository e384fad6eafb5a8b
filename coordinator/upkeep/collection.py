"""Removing files that nobody may need any more: a coordinator that runs for years keeps a bounded disk.

Gone are the blobs of updates that are in a version or were rejected, those of old versions (their rows stay),
files that devices start from once no device does, uploads of assignments that can no longer count, and what
killed processes were writing. What stays:

- the newest `[storage] keep_versions` versions, for export;
- the newest from which a late update may still come, and one more, because work on a version may just be
  under way to a device while the next one is published;
- the version of every open assignment, and of every update that is in no version yet;
- every blob that somebody holds a pin on: an upload or a version whose row is about to be written.

That a version is gone is written down first, and then its file goes. A crash in between leaves a blob that no
row needs, which the next run finds.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coordinator.adapters.ladder import version_of
from coordinator.storage.blobs import Blobs
from coordinator.storage.disk import blaming
from coordinator.storage.failpoints import Point, reach
from coordinator.storage.store import Store

MOST_FILES = 1000  # in one run, so that a run on a full folder ends soon; the next one goes on


@dataclass
class Collected:
    """What a run removed. `versions`: which can no longer be had."""

    versions: tuple[int, ...] = ()
    files: int = 0
    size_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.files} files, {self.size_bytes / 1e6:.1f} MB"


class Collector:
    """Removes files of one data folder. Runs are for a worker thread, one at a time.

    `newest`: so many versions are there, whoever needs them.
    """

    def __init__(self, store: Store, blobs: Blobs, keep_versions: int, staleness_limit: int) -> None:
        self._store, self._blobs = store, blobs
        self._staleness_limit = staleness_limit
        self.newest = max(keep_versions, staleness_limit + 2)

    def tidy(self) -> Collected:
        """Before anything else runs: remove what killed processes were writing, and every cached file.

        A cached file is not fsynced; after a power cut a torn one would look like a whole one.
        """
        found = Collected()
        for path in self._blobs.temporaries():
            self._remove(path, found, "temporary-collected")
        for name in self._blobs.cached_names():
            self._remove(self._blobs.cached(name), found, "cache-collected")
        return found

    def run(self) -> Collected:
        """Remove what is not needed, at most MOST_FILES files of each kind.

        Raises:
            DiskFull, InternalError: the disk fails; what is left is left for the next run.
        """
        found = Collected(tuple(self._store.collect_versions(self.newest)))
        self._collect_blobs(found)
        self._collect_cached(found)
        self._collect_uploads(found)
        return found

    def _collect_blobs(self, found: Collected) -> None:
        needed = self._store.needed_digests()
        gone = [digest for digest in self._blobs.digests() if digest not in needed]
        for digest in gone[:MOST_FILES]:
            remove = partial(self._remove, self._blobs.path(digest), found, "blob-collected")
            self._blobs.pins.remove(digest, partial(self._store.is_needed, digest), remove)

    def _collect_cached(self, found: Collected) -> None:
        """Files of versions that no device starts from at present; they can be made again."""
        started = self._store.started_versions()
        for name in self._blobs.cached_names():
            if version_of(name) not in started:
                remove = partial(self._remove, self._blobs.cached(name), found, "cache-collected")
                self._blobs.pins.remove(name, lambda: False, remove)

    def _collect_uploads(self, found: Collected) -> None:
        """Those whose update is here, or comes from a version that is too old to merge."""
        newest = self._store.versions(1)
        oldest = (newest[0].version if newest else 0) - self._staleness_limit
        gone = (id for id in self._blobs.upload_ids() if not self._store.may_come(id, oldest))
        for id in itertools.islice(gone, MOST_FILES):
            self._remove(self._blobs.upload_path(id), found, "upload-collected")

    def _remove(self, path: Path, found: Collected, point: Point) -> None:
        with blaming(f"{path.parent.name}/{path.name}"), contextlib.suppress(FileNotFoundError):
            size_bytes = path.stat().st_size
            path.unlink()
            found.files += 1
            found.size_bytes += size_bytes
            reach(point)
