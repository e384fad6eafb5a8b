"""One training call to a worker's process: reports come in, words go out, and nothing waits forever."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_sdk.core.records import from_json
from edge_sdk.training.plan import Abandoned, Interrupted, StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Word, raised

if TYPE_CHECKING:
    from edge_sdk.worker.process import WorkerProcess

HEARD_S = 0.5  # `on_step` is asked at least this often once there is a step to report
STEP_PATIENCE = 10.0  # a step may take this many times the longest before it
CLOSED = "it was closed"

Message = tuple[str, Any]
Inbox = queue.SimpleQueue[Message | None]  # None: the process has ended


class TrainingCall:
    """A training from the application's side, in the thread that called for it."""

    def __init__(
        self,
        worker: WorkerProcess,
        id: int,
        inbox: Inbox,
        job: Job,
        on_step: Callable[[StepReport], StepAnswer],
    ) -> None:
        self._worker, self._id, self._inbox, self._job = worker, id, inbox, job
        self._on_step = on_step
        self._last: StepReport | None = None
        self._heard_at = time.monotonic()
        self._longest_s = 0.0
        self._word: StepAnswer = "continue"
        self._said_at = 0.0

    def run(self) -> Finished:
        """Until the worker answers or ends."""
        while True:
            try:
                message = self._inbox.get(timeout=HEARD_S)
            except queue.Empty:
                self._wait()
                continue
            if message is None:
                raise self._end()
            if message[0] == "step":
                self._note(from_json(StepReport, message[1]))
            else:
                return from_json(Finished, answer_of(message))

    def _note(self, report: StepReport) -> None:
        now = time.monotonic()
        self._longest_s, self._heard_at = max(self._longest_s, now - self._heard_at), now
        self._last = report
        self._ask(report)

    def _ask(self, report: StepReport) -> None:
        """Hear the application, until it has said to leave off; one that said to finish may still do so."""
        if self._word in ("continue", "finish"):
            word = self._on_step(report)
            if word != "continue" and word != self._word:
                self.say(word)

    def say(self, word: Word) -> None:
        """Pass a word on. From any thread."""
        self._said_at, self._word = time.monotonic(), word
        self._worker.send("tell", self._id, word)

    def _wait(self) -> None:
        """Half a second without a message: ask again, enforce a word to leave off, and end what hangs."""
        now = time.monotonic()
        if self._last is not None:
            self._ask(self._last)
        if self._word in ("abandon", "interrupt") and now - self._said_at > self._worker.grace_s:
            self._worker.kill(f"it was told to {self._word}, and its step took too long")
        patience_s = max(self._worker.patience_s, STEP_PATIENCE * self._longest_s)
        if now - self._heard_at > patience_s:
            self._worker.kill(f"it said nothing for {patience_s:.0f} s")

    def _end(self) -> Exception:
        """What the end of the process means: what was wanted, if it was told to leave off."""
        if self._word == "abandon":
            return Abandoned()
        if self._word == "interrupt" or self._worker.end_because == CLOSED:
            return Interrupted()
        step = self._last.step if self._last else 0
        return self._worker.death(step, self._job.plan.described(self._job.ranks))


def answer_of(message: Message) -> Any:
    """The body of a reply; an error is raised as what it was."""
    kind, body = message
    if kind == "error":
        raise raised(body)
    return body
