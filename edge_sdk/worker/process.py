"""The application's side of the process that trains. Imports no torch: the application never holds it.

    with WorkerProcess(setup) as worker:
        worker.prepare()
        finished = worker.train(job, on_step=lambda report: "continue")

Whatever happens to the process (the system's out-of-memory killer, an abort in a native kernel, a hang) comes
out of these calls as an error, at once, and the application lives.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from edge_sdk.core.records import from_json, to_json
from edge_sdk.training.plan import StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Prepared, Question, Setup
from edge_sdk.worker.pipe import Pipe, answer_of
from edge_sdk.worker.training_call import Patience, TrainingCall


class WorkerProcess:
    """One worker in a process of its own. Calls may come from any thread; one training at a time.

    Args:
        setup: what it loads.
        environment: variables for the process on top of this one's, e.g. settings of its allocator.
        patience: how long it is waited for.
        python: the interpreter; an application that is frozen into one file names one.
    """

    def __init__(
        self,
        setup: Setup,
        environment: Mapping[str, str] | None = None,
        patience: Patience | None = None,
        python: str | None = None,
    ) -> None:
        self._setup, self._patience = setup, patience or Patience()
        self._pipe = Pipe(python or sys.executable, setup.threads, dict(environment or {}))
        self._training = False

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self) -> Prepared:
        """Start the process and load the base; seconds for a small one, minutes for a large one.

        Raises:
            InputError: no such model, device or data, or no interpreter to start.
            OutOfMemory: the base itself finds no room.
            WorkerDied: it ended, or said nothing for too long.
        """
        self._pipe.start()
        loaded = self._call("prepare", to_json(self._setup), f"loading {self._setup.model}")
        return from_json(Prepared, loaded)

    def close(self) -> None:
        """End the process and wait until it is gone. Work in its hands is left as the checkpoint has it."""
        self._pipe.close()

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        """Train one assignment. `on_step` is called in this thread; the worker does not wait for it.

        It is called for every step, and every half second with the last report while a step lasts. An answer
        to leave off is enforced after `Patience.grace_s`, whatever the worker is at: its checkpoint is the
        last one then, otherwise it is of the step just done.

        Raises:
            Abandoned, Interrupted: `on_step` said so, or the worker was closed meanwhile.
            OutOfMemory: its memory was not enough, or it was killed by the system. The checkpoint goes on.
            WorkerDied: it ended otherwise, or said nothing for too long.
            InputError, AdapterError: as `Trainer.train`.
        """
        self._training = True
        try:
            return TrainingCall(self._pipe, self._patience, job, on_step).run()
        finally:
            self._training = False

    def generate(self, question: Question, on_text: Callable[[str], None] | None = None) -> list[str]:
        """Answers, also while another thread trains. `on_text` hears them in pieces.

        Raises:
            OutOfMemory, WorkerDied, AdapterError: as they say.
        """
        doing = f"answering in {question.max_new_tokens} tokens"
        answers: list[str] = self._call("generate", to_json(question), doing, on_text)
        return answers

    def _call(self, kind: str, body: Any, doing: str, on_text: Callable[[str], None] | None = None) -> Any:
        """Send a call and wait for its answer."""
        silence_s = self._patience.silence_s
        with self._pipe.inbox() as (id, inbox):
            self._pipe.send(kind, id, body)
            while True:
                try:
                    message = inbox.get(timeout=silence_s)
                except queue.Empty:
                    if not self._training:  # a training knows how long its steps may take
                        self._pipe.kill(f"it said nothing for {silence_s:.0f} s")
                    continue
                if message is None:
                    raise self._pipe.death(0, doing)
                if message[0] != "text":
                    return answer_of(message)
                if on_text is not None:
                    on_text(message[1])
