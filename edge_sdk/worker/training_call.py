"""One training call through a worker's pipe: reports come in, words go out, and nothing waits forever."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.core.records import from_json, to_json
from edge_sdk.training.plan import Abandoned, Interrupted, StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Word
from edge_sdk.worker.pipe import Inbox, Pipe, answer_of

HEARD_S = 0.5  # `on_step` is asked at least this often once there is a step to report
STEP_PATIENCE = 10.0  # a step may take this many times the longest before it


@dataclass(frozen=True)
class Patience:
    """How long a worker is waited for before its process is ended.

    Args:
        silence_s: how long it may say nothing: for loading a base, and for a step if none before was slow.
        grace_s: how long a step may still take after a word to leave off.
    """

    silence_s: float = 600.0
    grace_s: float = 2.0


class TrainingCall:
    """A training from the application's side, in the thread that called for it.

    Args:
        pipe: to the worker.
        patience: how long it is waited for.
        job: what it trains.
        on_step: see `WorkerProcess.train`.
    """

    def __init__(
        self, pipe: Pipe, patience: Patience, job: Job, on_step: Callable[[StepReport], StepAnswer]
    ) -> None:
        self._pipe, self._patience, self._job, self._on_step = pipe, patience, job, on_step
        self._id = 0
        self._last: StepReport | None = None
        self._heard_at = 0.0
        self._longest_s = 0.0
        self._word: StepAnswer = "continue"
        self._said_at = 0.0

    def run(self) -> Finished:
        """Send the job, and see to it until the worker answers or ends.

        Raises:
            As `WorkerProcess.train`.
        """
        with self._pipe.inbox() as (self._id, inbox):
            self._heard_at = time.monotonic()
            try:
                self._pipe.send("train", self._id, to_json(self._job))
                return self._listen(inbox)
            except BaseException:  # of the application's own code too: nobody waits for this training now
                self._pipe.send("tell", self._id, "abandon")
                raise

    def _listen(self, inbox: Inbox) -> Finished:
        while True:
            try:
                message = inbox.get(timeout=HEARD_S)
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
                self._say(word)

    def _say(self, word: Word) -> None:
        self._said_at, self._word = time.monotonic(), word
        self._pipe.send("tell", self._id, word)

    def _wait(self) -> None:
        """Half a second without a message: ask again, enforce a word to leave off, and end what hangs."""
        now = time.monotonic()
        if self._last is not None:
            self._ask(self._last)
        if self._word in ("abandon", "interrupt") and now - self._said_at > self._patience.grace_s:
            self._pipe.kill(f"it was told to {self._word}, and its step took too long")
        silence_s = max(self._patience.silence_s, STEP_PATIENCE * self._longest_s)
        if now - self._heard_at > silence_s:
            self._pipe.kill(f"it said nothing for {silence_s:.0f} s")

    def _end(self) -> Exception:
        """What the end of the process means: what was wanted, if it was told to leave off."""
        if self._word == "abandon":
            return Abandoned()
        if self._word == "interrupt" or self._pipe.closed:
            return Interrupted()
        step = self._last.step if self._last else 0
        return self._pipe.death(step, self._job.plan.described(self._job.ranks))
