"""The application's side of the process that trains. Imports no torch: the application never holds it.

    with WorkerProcess(setup) as worker:
        worker.prepare()
        finished = worker.train(job, on_step=lambda report: "continue")

Whatever happens to the process (the system's out-of-memory killer, an abort in a native kernel, a hang) comes
out of these calls as an error, at once, and the application lives.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from edge_sdk.core.errors import InputError, ProtocolError, WorkerDied
from edge_sdk.core.records import from_json, to_json
from edge_sdk.out_of_memory import out_of_memory
from edge_sdk.process_end import Ending, ending_of
from edge_sdk.stderr_tail import StderrTail
from edge_sdk.training import Abandoned, Interrupted, StepAnswer, StepReport
from edge_sdk.worker_messages import (
    Finished,
    Job,
    Memory,
    Prepared,
    Question,
    Setup,
    Word,
    line,
    parsed,
    raised,
)

log = logging.getLogger("edge_sdk.worker")

HEARD_S = 0.5  # `on_step` is asked at least this often once there is a step to report
PATIENCE_S = (
    600.0  # loading a base, or one step, may take this long; a step also ten times the longest before
)
STEP_PATIENCE = 10.0
GRACE_S = 2.0  # a word to leave off is heard between two steps; after this long it is enforced
CLOSING_S = 5.0

CLOSED = "it was closed"

Message = tuple[str, Any]
Inbox = queue.SimpleQueue[Message | None]


class WorkerProcess:
    """One worker in a process of its own. Calls may come from any thread; one training at a time.

    Args:
        setup: what it loads.
        environment: variables for the process on top of this one's, e.g. settings of its allocator.
        patience_s: how long it may say nothing before it counts as hung and is ended.
        python: the interpreter; an application that is frozen into one file names one.
    """

    def __init__(
        self,
        setup: Setup,
        environment: Mapping[str, str] | None = None,
        patience_s: float = PATIENCE_S,
        python: str | None = None,
    ) -> None:
        self._setup, self._environment = setup, dict(environment or {})
        self.patience_s, self._python = patience_s, python or sys.executable
        self._ids = itertools.count(1)
        self._lock = threading.Lock()  # of the inboxes, and of what is written
        self._inboxes: dict[int, Inbox] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Ending | None = None
        self._end_because = ""  # set before this side ends the process
        self._training: _Training | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._live, name="edge-sdk-worker", daemon=True)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- life ---

    def prepare(self) -> Prepared:
        """Start the process and load the base; seconds for a small one, minutes for a large one.

        Raises:
            InputError: no such model, device or data, or no interpreter to start.
            OutOfMemory: the base itself finds no room.
            WorkerDied: it ended, or said nothing for `patience_s`.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            reason = self._failure.strerror
            raise InputError(f"{self._python!r} cannot be started to train ({reason}); name an interpreter")
        return from_json(
            Prepared, self._call("prepare", to_json(self._setup), f"loading {self._setup.model}")
        )

    @property
    def pid(self) -> int | None:
        """The process id while it lives."""
        return self._process.pid if self._process is not None and not self._ended.is_set() else None

    def close(self, grace_s: float = CLOSING_S) -> None:
        """End the process and wait until it is gone. Work in its hands is left as the checkpoint has it."""
        self._end_because = self._end_because or CLOSED
        if not self._started.is_set():
            return
        if self._process is not None and self._process.stdin is not None:
            with self._lock:
                self._close_pipe(self._process.stdin)
        if not self._ended.wait(grace_s):
            self._kill(CLOSED)
        self._thread.join()

    def _kill(self, because: str) -> None:
        """End it now. Every call in hand is told why."""
        self._end_because = because
        if self._process is not None:
            self._process.kill()

    # --- calls ---

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        """Train one assignment. `on_step` is called in this thread; the worker does not wait for it.

        It is called for every step, and every half second with the last report while a step lasts. An answer
        to leave off is enforced after two seconds, whatever the worker is at: its checkpoint is the last one
        then, otherwise it is of the step just done.

        Raises:
            Abandoned, Interrupted: `on_step` or `tell` said so, or the worker was closed meanwhile.
            OutOfMemory: its memory was not enough, or it was killed by the system. The checkpoint goes on.
            WorkerDied: it ended otherwise, or said nothing for too long.
            InputError, AdapterError: as `Trainer.train`.
        """
        id, inbox = self._open_inbox()
        self._training = _Training(self, id, inbox, job, on_step)
        try:
            self._send("train", id, to_json(job))
            return self._training.run()
        finally:
            self._training = None
            self._close_inbox(id)

    def tell(self, word: Word) -> None:
        """Say a word to the training in hand, from any thread, as an answer of `on_step` would."""
        if (training := self._training) is not None:
            training.say(word)

    def generate(self, question: Question, on_text: Callable[[str], None] | None = None) -> list[str]:
        """Answers, also while another thread trains. `on_text` hears them in pieces.

        Raises:
            OutOfMemory, WorkerDied, AdapterError: as they say.
        """
        doing = f"answering in {question.max_new_tokens} tokens"
        answers: list[str] = self._call("generate", to_json(question), doing, on_text)
        return answers

    def memory(self) -> Memory:
        """What the worker's process holds; after the step in hand, for it is answered between trainings."""
        return from_json(Memory, self._call("memory", None, "measuring"))

    def _call(self, kind: str, body: Any, doing: str, on_text: Callable[[str], None] | None = None) -> Any:
        """Send a call and wait for its answer."""
        id, inbox = self._open_inbox()
        try:
            self._send(kind, id, body)
            while True:
                try:
                    message = inbox.get(timeout=self.patience_s)
                except queue.Empty:
                    self._kill(f"it said nothing for {self.patience_s:.0f} s")
                    continue
                if message is None:
                    raise self._death(0, doing)
                if message[0] != "text":
                    return _answer(message)
                if on_text is not None:
                    on_text(message[1])
        finally:
            self._close_inbox(id)

    # --- messages ---

    def _open_inbox(self) -> tuple[int, Inbox]:
        """A place for the answers to a call. Of a process that has ended it holds that already."""
        with self._lock:
            id, inbox = next(self._ids), Inbox()
            self._inboxes[id] = inbox
            if self._ended.is_set() or not self._thread.ident:
                inbox.put(None)
            return id, inbox

    def _close_inbox(self, id: int) -> None:
        with self._lock:
            self._inboxes.pop(id, None)

    def _send(self, kind: str, id: int, body: Any) -> None:
        """Write a message. A pipe that is closed says nothing here: the end is told through the inbox."""
        pipe = self._process.stdin if self._process is not None else None
        with self._lock:
            if pipe is None or pipe.closed:
                return
            try:
                pipe.write(line(kind, id, body))
                pipe.flush()
            except OSError:
                self._close_pipe(pipe)

    @staticmethod
    def _close_pipe(pipe: Any) -> None:
        """Close a pipe whose other end may be gone with unread bytes in it."""
        try:
            pipe.close()
        except OSError:
            log.debug("the worker did not read its last message")

    def _death(self, step: int, doing: str) -> Exception:
        """The error for a process that ended in the middle of something."""
        self._ended.wait(CLOSING_S)
        ending = self._ending or Ending("it was never started", memory=False)
        if self._end_because:
            return WorkerDied(f"the process that trains was ended: {self._end_because}", step=step)
        if ending.memory:
            return out_of_memory(step, doing, ending.reason)
        text = f"the process that trains ended after step {step}: {ending.reason}"
        return WorkerDied(text, step=step, reason=ending.reason)

    # --- the thread that lives as long as the process ---

    def _live(self) -> None:
        """Start the process and pass its messages on until it ends.

        Linux kills the process when the thread that started it ends, so that it must be this one: a thread of
        the application's may end at any time.
        """
        try:
            process = self._process = self._start()
        except OSError as error:
            self._failure = error
            self._ended.set()
            self._started.set()
            return
        assert process.stdout is not None
        assert process.stderr is not None
        tail = StderrTail(process.stderr)
        self._started.set()
        try:
            self._pass_on(process.stdout)
        except ProtocolError as error:
            self._kill(str(error))
        self._bury(process, tail)

    def _pass_on(self, pipe: IO[bytes]) -> None:
        """Every message to whoever waits for it, until the pipe closes."""
        for raw in pipe:
            kind, id, body = parsed(raw)
            with self._lock:
                if id in self._inboxes:
                    self._inboxes[id].put((kind, body))

    def _bury(self, process: subprocess.Popen[bytes], tail: StderrTail) -> None:
        """Its pipe is closed: see that it is gone, and tell whoever waits for it."""
        try:
            code = process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._ending = ending_of(code, tail.text())
        assert process.stdin is not None
        assert process.stdout is not None
        with self._lock:
            self._close_pipe(process.stdin)
            process.stdout.close()
            self._ended.set()
            for inbox in self._inboxes.values():
                inbox.put(None)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the interpreter on the very code that runs here, whatever folder or path that came from."""
        here = str(Path(__file__).resolve().parents[1])
        threads = str(self._setup.threads)
        own = {
            "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        if sys.stderr is not None and sys.stderr.isatty():
            columns, lines = os.get_terminal_size(sys.stderr.fileno())
            own |= {
                "COLUMNS": str(columns),
                "LINES": str(lines),
            }  # bars ask for them where there is no terminal
        return subprocess.Popen(
            [self._python, "-P", "-m", "edge_sdk.worker_main", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | own | self._environment,
        )


class _Training:
    """One training call: reports come in, words go out, and nothing waits forever."""

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
                return from_json(Finished, _answer(message))

    def _note(self, report: StepReport) -> None:
        now = time.monotonic()
        self._longest_s, self._heard_at = max(self._longest_s, now - self._heard_at), now
        self._last = report
        self._ask(report)

    def _ask(self, report: StepReport) -> None:
        """Hear the application, until it has said to leave off."""
        if self._word == "continue" and (word := self._on_step(report)) != "continue":
            self.say(word)

    def say(self, word: Word) -> None:
        """Pass a word on. From any thread."""
        self._said_at, self._word = time.monotonic(), word
        self._worker._send("tell", self._id, word)

    def _wait(self) -> None:
        """Half a second without a message: ask again, enforce a word to leave off, and end what hangs."""
        now = time.monotonic()
        if self._last is not None:
            self._ask(self._last)
        if self._word in ("abandon", "interrupt") and now - self._said_at > GRACE_S:
            self._worker._kill(f"it was told to {self._word}, and its step took too long")
        patience_s = max(self._worker.patience_s, STEP_PATIENCE * self._longest_s)
        if now - self._heard_at > patience_s:
            self._worker._kill(f"it said nothing for {patience_s:.0f} s")

    def _end(self) -> Exception:
        """What the end of the process means: what was wanted, if it was told to leave off."""
        if self._word == "abandon":
            return Abandoned()
        if self._word == "interrupt" or self._worker._end_because == CLOSED:
            return Interrupted()
        step = self._last.step if self._last else 0
        return self._worker._death(step, self._job.plan.described(self._job.ranks))


def _answer(message: Message) -> Any:
    """The body of a reply; an error is raised as what it was."""
    kind, body = message
    if kind == "error":
        raise raised(body)
    return body
