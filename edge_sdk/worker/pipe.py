"""A process's standard error, passed on as it comes, and its end remembered."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import IO

KEPT_BYTES = 4096
LAST_S = 1.0  # for what is still in the pipe when the process has ended


class StderrTail:
    """Copies `pipe` to this process's standard error in a thread of its own, until it closes."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._kept = pipe, b""
        self._thread = threading.Thread(target=self._copy, name="edge-sdk-worker-stderr", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """The last lines, once the process has ended."""
        self._thread.join(LAST_S)
        return self._kept.decode(errors="replace")

    def _copy(self) -> None:
        with self._pipe:
            while piece := os.read(self._pipe.fileno(), 1 << 16):
                self._kept = (self._kept + piece)[-KEPT_BYTES:]
                if sys.stderr is None:  # a windowed application
                    continue
                with contextlib.suppress(
                    OSError, ValueError
                ):  # a terminal that is gone must not stop the worker
                    sys.stderr.write(piece.decode(errors="replace"))
                    sys.stderr.flush()
