"""Room on the disk that is kept for merges: below it nothing new is taken in."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_sdk.core.errors import DiskFull

MOST_KEPT_BYTES, KEPT_SHARE = 1 << 30, 0.05  # where the host names none


class FreeDisk:
    """What is free where a folder lies, as of the last look and less what was taken since.

    `least_bytes`: that must stay free; None: a share of the disk, up to a number of bytes.
    """

    def __init__(self, folder: Path, least_bytes: int | None = None) -> None:
        self._folder = folder
        usage = shutil.disk_usage(folder)
        chosen = int(min(MOST_KEPT_BYTES, KEPT_SHARE * usage.total)) if least_bytes is None else least_bytes
        self.least_bytes = chosen
        self._free_bytes = usage.free

    def look(self) -> None:
        """Ask the system. In a worker thread: a disk in the network may take its time."""
        self._free_bytes = shutil.disk_usage(self._folder).free

    def take(self, size_bytes: int = 0) -> None:
        """Count bytes that are about to be written.

        Raises:
            DiskFull: less would be free than must stay so.
        """
        if self._free_bytes - size_bytes < self.least_bytes:
            raise DiskFull(
                f"the coordinator's disk has less than {self.least_bytes >> 20} MB free, which are kept for "
                "merges; its host must make room; nothing is lost"
            )
        self._free_bytes -= size_bytes
