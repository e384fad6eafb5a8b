"""The base model in memory: loaded when it is needed, let go when the machine is somebody else's again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from edge_sdk.worker.process import WorkerProcess
    from edge_sdk.worker.worker import Worker

    Trainee: TypeAlias = Worker | WorkerProcess


class ResidentModel:
    """At most one worker with the base loaded, in a process of its own or in this one.

    Args:
        load: makes a worker that is prepared.
    """

    def __init__(self, load: Callable[[], Trainee]) -> None:
        self._load = load
        self._worker: Trainee | None = None
        self._changing = threading.RLock()  # held while loading and letting go, and by whoever asks something
        self._asked_at = 0.0

    def worker(self) -> Trainee:
        """The worker, after loading the base if it is not here."""
        with self._changing:
            if self._worker is None:
                self._worker = self._load()
            return self._worker

    def ask(self, question: Callable[[Trainee], list[str]]) -> list[str]:
        """Ask the model something; it is not let go meanwhile."""
        with self._changing:
            try:
                return question(self.worker())
            finally:
                self._asked_at = time.monotonic()

    @property
    def loaded(self) -> bool:
        """Whether the base is in memory."""
        return self._worker is not None

    def let_go(self, unless_asked_s: float = 0.0) -> None:
        """Free its memory, after an answer in hand; not if somebody asked it in the last `unless_asked_s`."""
        if self._worker is None or time.monotonic() - self._asked_at < unless_asked_s:
            return
        with self._changing:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.close()
