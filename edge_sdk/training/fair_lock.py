"""A lock granted in the order of asking: training steps and answers take turns with one model."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A lock granted in the order of asking; the thread that holds it may take it again inside.

    A plain lock promises no order: training, which asks again at once, could keep an answer waiting for many
    steps. Here whoever asks in the middle of a step comes next.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me, ticket = threading.get_ident(), object()
        with self._changed:
            if self._owner != me:
                self._queue.append(ticket)
                try:
                    while self._owner is not None or self._queue[0] is not ticket:
                        self._changed.wait()
                finally:  # also when Ctrl-C ends the wait: a ticket left behind would block everybody
                    self._queue.remove(ticket)
                    self._changed.notify_all()
                self._owner = me
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        with self._changed:
            return len(self._queue)
