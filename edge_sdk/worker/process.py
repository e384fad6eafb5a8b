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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from edge_sdk.core.errors import InputError, ProtocolError, WorkerDied
from edge_sdk.core.records import from_json, to_json
from edge_sdk.system.child_process import Ending, ending_of
from edge_sdk.system.out_of_memory import out_of_memory
from edge_sdk.training.plan import StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Memory, Prepared, Question, Setup, Word, line, parsed
from edge_sdk.worker.pipe import StderrTail
from edge_sdk.worker.training_call import CLOSED, Inbox, TrainingCall, answer_of

log = logging.getLogger("edge_sdk.worker.worker")

GRACE_S = 2.0
PATIENCE_S = 600.0  # for loading a base, and for one step if those before were not slow
CLOSING_S = 5.0


class WorkerProcess:
    """One worker in a process of its own. Calls may come from any thread; one training at a time.

    Args:
        setup: what it loads.
        environment: variables for the process on top of this one's, e.g. settings of its allocator.
        patience_s: how long it may say nothing before it counts as hung and is ended.
        grace_s: how long a step may still take after a word to leave off, before the process is ended.
        python: the interpreter; an application that is frozen into one file names one.
    """

    def __init__(
        self,
        setup: Setup,
        environment: Mapping[str, str] | None = None,
        patience_s: float = PATIENCE_S,
        grace_s: float = GRACE_S,
        python: str | None = None,
    ) -> None:
        self._setup, self._environment = setup, dict(environment or {})
        self.patience_s, self.grace_s = patience_s, grace_s
        self._python = python or sys.executable
        self._ids = itertools.count(1)
        self._lock, self._writing = threading.Lock(), threading.Lock()  # of the inboxes, and of the pipe
        self._inboxes: dict[int, Inbox] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: Ending | None = None
        self.end_because = ""  # set before this side ends the process
        self._training: TrainingCall | None = None
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
        self.end_because = self.end_because or CLOSED
        if not self._started.is_set():
            return
        # A writer that waits for a worker that does not read holds the lock: then only killing helps.
        if self._process is not None and self._writing.acquire(timeout=grace_s):
            self._close_pipe(self._process.stdin)
            self._writing.release()
        if not self._ended.wait(grace_s):
            self.kill(CLOSED)
        self._thread.join()

    def kill(self, because: str) -> None:
        """End it now. Every call in hand is told why."""
        self.end_because = because
        if self._process is not None:
            self._process.kill()

    # --- calls ---

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        """Train one assignment. `on_step` is called in this thread; the worker does not wait for it.

        It is called for every step, and every half second with the last report while a step lasts. An answer
        to leave off is enforced after `grace_s`, whatever the worker is at: its checkpoint is the last one
        then, otherwise it is of the step just done.

        Raises:
            Abandoned, Interrupted: `on_step` or `tell` said so, or the worker was closed meanwhile.
            OutOfMemory: its memory was not enough, or it was killed by the system. The checkpoint goes on.
            WorkerDied: it ended otherwise, or said nothing for too long.
            InputError, AdapterError: as `Trainer.train`.
        """
        id, inbox = self._open_inbox()
        self._training = TrainingCall(self, id, inbox, job, on_step)
        try:
            self.send("train", id, to_json(job))
            return self._training.run()
        except BaseException:  # of the application's own code too: nobody waits for this training any more
            self.send("tell", id, "abandon")
            raise
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
        """What the worker's process holds, also while another thread trains."""
        return from_json(Memory, self._call("memory", None, "measuring"))

    def _call(self, kind: str, body: Any, doing: str, on_text: Callable[[str], None] | None = None) -> Any:
        """Send a call and wait for its answer."""
        id, inbox = self._open_inbox()
        try:
            self.send(kind, id, body)
            while True:
                try:
                    message = inbox.get(timeout=self.patience_s)
                except queue.Empty:
                    if self._training is not None:
                        continue  # it knows how long its steps take
                    self.kill(f"it said nothing for {self.patience_s:.0f} s")
                    continue
                if message is None:
                    raise self.death(0, doing)
                if message[0] != "text":
                    return answer_of(message)
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

    def send(self, kind: str, id: int, body: Any) -> None:
        """Write a message. A pipe that is closed says nothing here: the end is told through the inbox."""
        pipe = self._process.stdin if self._process is not None else None
        with self._writing:
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

    def death(self, step: int, doing: str) -> Exception:
        """The error for a process that ended in the middle of something."""
        self._ended.wait(CLOSING_S)
        ending = self._ending or Ending("it was never started", memory=False)
        if self.end_because:
            return WorkerDied(f"the process that trains was ended: {self.end_because}", step=step)
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
            self.kill(str(error))
        self._bury(process, tail)

    def _pass_on(self, pipe: IO[bytes]) -> None:
        """Every message to whoever waits for it, until the pipe closes."""
        for raw in pipe:
            if not raw.endswith(b"\n"):
                return  # it was killed in the middle of a message
            kind, id, body = parsed(raw)
            with self._lock:
                if id in self._inboxes:
                    self._inboxes[id].put((kind, body))

    def _bury(self, process: subprocess.Popen[bytes], tail: StderrTail) -> None:
        """Its pipe is closed: see that it is gone, and tell whoever waits for it."""
        try:
            code = process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            self.kill("it closed its pipe and did not end")
            code = process.wait()
        self._ending = ending_of(code, tail.text())
        assert process.stdin is not None
        assert process.stdout is not None
        with self._writing:
            self._close_pipe(process.stdin)
        with self._lock:
            process.stdout.close()
            self._ended.set()
            for inbox in self._inboxes.values():
                inbox.put(None)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the interpreter on the very code that runs here, whatever folder or path that came from."""
        here = str(Path(__file__).resolve().parents[2])
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
            [self._python, "-P", "-m", "edge_sdk.worker.main", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | own | self._environment,
        )
