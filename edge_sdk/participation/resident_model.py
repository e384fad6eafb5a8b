"""The base model in memory: loaded when it is needed, let go when the machine is somebody else's again.

The worker that holds it is in a process of its own, or in the application's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edge_sdk.core.messages import Federation
from edge_sdk.membership.identity import model_of
from edge_sdk.options import Options
from edge_sdk.participation.decision import Decision
from edge_sdk.training.plan import StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Question, Setup


class Trainee(Protocol):
    """A base that is loaded, to train and to ask: `Worker` in this process, `WorkerProcess` in its own."""

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        """Train one assignment; see `WorkerProcess.train`."""

    def generate(self, question: Question, on_text: Callable[[str], None] | None = None) -> list[str]:
        """Answers, also while another thread trains."""

    def close(self) -> None:
        """Let go of the base."""


class ResidentModel:
    """At most one worker with the base loaded, in a process of its own or in this one.

    Args:
        load: makes a worker that is prepared.
        clock: tells seconds.
    """

    def __init__(self, load: Callable[[], Trainee], clock: Callable[[], float]) -> None:
        self._load, self._clock = load, clock
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
                self._asked_at = self._clock()

    @property
    def loaded(self) -> bool:
        """Whether the base is in memory."""
        return self._worker is not None

    def let_go(self, unless_asked_s: float = 0.0) -> None:
        """Free its memory, after an answer in hand; not if somebody asked it in the last `unless_asked_s`."""
        if self._worker is None or self._clock() - self._asked_at < unless_asked_s:
            return
        with self._changing:
            worker, self._worker = self._worker, None
            if worker is not None:
                worker.close()


def worker_for(
    federation: Federation, options: Options, data: Path | None, decision: Decision | None
) -> Trainee:
    """A worker with the base loaded. `decision`: how the device trains; None for one that only answers.

    Raises:
        InputError, OutOfMemory, WorkerDied: as `WorkerProcess.prepare`.
    """
    setup = Setup(
        model=model_of(federation, options),
        modules=federation.base.modules,
        scaling=federation.scaling,
        upload_dtype=federation.upload_dtype,
        trust_remote_code=options.trust_remote_code,
        data=str(data) if data else None,
        device=options.device,
        quantise=decision.quantise if decision else options.quantise,
        bitsandbytes=decision.bitsandbytes if decision else True,
        threads=options.threads,
        niceness=options.nice,
        progress=options.progress if options.progress is not None else sys.stderr.isatty(),
        alone=options.isolate,
    )
    return _in_a_process(setup) if options.isolate else _in_this_process(setup)


def _in_a_process(setup: Setup) -> Trainee:
    """A worker in a process of its own; if it cannot be made, none is left behind."""
    from edge_sdk.worker.process import WorkerProcess

    worker = WorkerProcess(setup)
    try:
        worker.prepare()
    except BaseException:
        worker.close()
        raise
    return worker


def _in_this_process(setup: Setup) -> Trainee:
    """A worker that shares the application's process, its libraries and its fate."""
    from edge_sdk.worker.worker import Worker

    return Worker(setup)
