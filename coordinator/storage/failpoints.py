"""Named points between two steps on the disk, where a test may end this process or make the disk fail.

A crash is harmless only if it is harmless between any two steps. So each step is followed by a point with a
name; `tests/faults/` kills a real coordinator at every one of them and looks at what is left. The table in
docs/DURABILITY.md says what each leaves behind. Unset, which is always but in those tests, a point is one
look at a variable.

The command line arms points from the environment and from nowhere else: nothing on the network can.

    EDGE_COORDINATOR_FAIL=blob-renamed=kill          SIGKILL to itself when it comes there
    EDGE_COORDINATOR_FAIL=blob-renamed@3=kill        … the third time
    EDGE_COORDINATOR_FAIL=upload-appended@2-9=ENOSPC an OSError of that name from the second to the ninth time
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Literal, get_args

from edge_sdk.core.errors import InputError

VARIABLE = "EDGE_COORDINATOR_FAIL"

Point = Literal[
    # Uploads: bytes appended to one; one that was refused, or is known already, dropped.
    "upload-appended",
    "upload-dropped",
    # A blob, of an update or a version: complete, on disk, its folder made, renamed, the name on disk.
    "blob-written",
    "blob-fsynced",
    "blob-folder-made",
    "blob-renamed",
    "blob-folder-fsynced",
    # A file that devices start from, which can be made again.
    "cache-written",
    "cache-renamed",
    # The file that says what the database must account for, at each start and version.
    "folder-file-written",
    "folder-file-renamed",
    # The tokens of this machine: at the first start, and the join token when a device is revoked.
    "token-written",
    "token-renamed",
    # The key and the certificate that the coordinator makes itself, at the first start that needs them.
    "tls-key-written",
    "tls-key-renamed",
    "tls-certificate-written",
    "tls-certificate-renamed",
    # Rows: written in a transaction that is still open; committed.
    "meta-written",
    "meta-committed",
    "run-written",
    "run-committed",
    "device-written",
    "device-committed",
    "credential-written",
    "credential-committed",
    "seen-written",
    "seen-committed",
    "standing-written",
    "standing-committed",
    "invitation-written",
    "invitation-committed",
    "audit-written",
    "audit-committed",
    "elsewhere-written",
    "elsewhere-committed",
    "assignment-written",
    "assignment-committed",
    "expiry-written",
    "expiry-committed",
    "refusal-written",
    "refusal-committed",
    "update-written",
    "update-committed",
    "clip-written",
    "clip-committed",
    "rejection-written",
    "rejection-committed",
    "version-written",
    "version-committed",
    "collected-written",
    "collected-committed",
    # An older schema: its copy complete, in its place; a step written, committed.
    "migration-copied",
    "migration-copy-renamed",
    "migration-written",
    "migration-committed",
    # Collection: one file of each kind gone.
    "blob-collected",
    "cache-collected",
    "upload-collected",
    "temporary-collected",
    # A backup: the rows copied, a blob in its place, all but the name of the rows' copy on disk.
    "backup-rows",
    "backup-blob",
    "backup-ready",
]
POINTS: tuple[Point, ...] = get_args(Point)


@dataclass
class _Armed:
    """One point, the times at which it acts, and what it does: an errno, or 0 to kill."""

    first: int
    last: int
    number: int
    count: int = 0


_armed: dict[str, _Armed] | None = None
_lock = threading.Lock()


def reach(point: Point) -> None:
    """Say that this point was reached. Does nothing unless it is armed.

    Raises:
        OSError: it is armed with that.
    """
    if _armed is not None:
        _act(point)


def arm(text: str) -> None:
    """Arm points as `text` says, separated by commas; "" arms none.

    Raises:
        InputError: a point or an action is not known; names it.
    """
    global _armed  # noqa: PLW0603 - one look at one variable is all that a point may cost
    armed = dict(_parsed(part.strip()) for part in text.split(",") if part.strip())
    _armed = armed or None


def _parsed(text: str) -> tuple[str, _Armed]:
    found = re.fullmatch(r"(?P<point>[a-z-]+)(@(?P<first>\d+)(-(?P<last>\d+))?)?=(?P<action>\w+)", text)
    if not found:
        raise InputError(f"{VARIABLE}: {text!r} is not written like blob-renamed=kill or blob-renamed@3=EIO")
    point, action = found["point"], found["action"]
    if point not in POINTS:
        raise InputError(f"{VARIABLE}: no point is called {point!r}; there are {', '.join(POINTS)}")
    number = 0 if action == "kill" else getattr(errno, action, None)
    if not isinstance(number, int):
        raise InputError(f"{VARIABLE}: {action!r} is neither `kill` nor the name of an error like ENOSPC")
    first = int(found["first"] or 1)
    last = int(found["last"] or found["first"] or sys.maxsize)
    return point, _Armed(first, last, number)


def _act(point: Point) -> None:
    with _lock:
        armed = _armed.get(point) if _armed else None
        if armed is None:
            return
        armed.count += 1
        due = armed.first <= armed.count <= armed.last
    if due and armed.number:
        raise OSError(armed.number, os.strerror(armed.number))
    if due:
        os.write(2, f"reached {point}, time {armed.count}: killed\n".encode())
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows ends it at any number
