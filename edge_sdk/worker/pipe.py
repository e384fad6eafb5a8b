"""A worker's process and the pipes to it: messages go in, answers come out to whoever waits for them.

Imports no torch: the application never holds it. What a message means is not known here, see `process` and
`training_call`; how it looks is said in `messages`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edge_sdk.core.errors import InputError, ProtocolError, WorkerDied
from edge_sdk.system.child_process import Ending, ending_of
from edge_sdk.system.out_of_memory import out_of_memory
from edge_sdk.system.terminal import logger, pass_on
from edge_sdk.worker.messages import line, parsed, raised

log = logger("edge_sdk.worker")

CLOSING_S = 5.0
CLOSED = "it was closed"
KEPT_BYTES = 4096  # of what the process said last on standard error
LAST_S = 1.0  # for what is still in the pipe when the process has ended

Message = tuple[str, Any]  # kind and body
Inbox = queue.SimpleQueue[Message | None]  # None: the process has ended


class Pipe:
    """A process that speaks `messages`, from its start until it is gone. Every method is for any thread.

    Args:
        python: the interpreter that runs the worker.
        threads: how many threads its libraries may compute with.
        environment: variables for the process on top of this one's.
    """

    def __init__(self, python: str, threads: int, environment: dict[str, str]) -> None:
        self._python, self._threads, self._environment = python, threads, environment
        self._ids = itertools.count(1)
        self._lock, self._writing = threading.Lock(), threading.Lock()  # of the inboxes, and of the pipe
        self._inboxes: dict[int, Inbox] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._end_because = ""  # set before this side ends the process
        self._ending = Ending("it was never started", memory=False)
        self._started, self._ended = threading.Event(), threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._live, name="edge-sdk-worker", daemon=True)

    # --- life ---

    def start(self) -> None:
        """Start the process; once.

        Raises:
            InputError: there is no such interpreter to start.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            reason = self._failure.strerror
            raise InputError(f"{self._python!r} cannot be started to train ({reason}); name an interpreter")

    def close(self) -> None:
        """End the process and wait until it is gone; one that does not end by itself is killed."""
        self._end_because = self._end_because or CLOSED
        if not self._started.is_set():
            return
        # A writer that waits for a worker that does not read holds the lock: then only killing helps.
        if self._process is not None and self._writing.acquire(timeout=CLOSING_S):
            self._close_pipe(self._process.stdin)
            self._writing.release()
        if not self._ended.wait(CLOSING_S):
            self.kill(CLOSED)
        self._thread.join()

    def kill(self, because: str) -> None:
        """End the process now. Every call in hand is told why."""
        self._end_because = because
        if self._process is not None:
            self._process.kill()

    @property
    def closed(self) -> bool:
        """Whether `close` ended the process, and not something that went wrong."""
        return self._end_because == CLOSED

    def death(self, step: int, doing: str) -> Exception:
        """The error for a process that ended after `step` steps, in the middle of `doing` something."""
        self._ended.wait(CLOSING_S)
        if self._end_because:
            return WorkerDied(f"the process that trains was ended: {self._end_because}", step=step)
        if self._ending.memory:
            return out_of_memory(step, doing, self._ending.reason)
        text = f"the process that trains ended after step {step}: {self._ending.reason}"
        return WorkerDied(text, step=step, reason=self._ending.reason)

    # --- messages ---

    @contextlib.contextmanager
    def inbox(self) -> Iterator[tuple[int, Inbox]]:
        """An id for a call, and where its answers arrive; the end of the process, if that is over already."""
        with self._lock:
            id, inbox = next(self._ids), Inbox()
            self._inboxes[id] = inbox
            if self._ended.is_set() or not self._thread.ident:
                inbox.put(None)
        try:
            yield id, inbox
        finally:
            with self._lock:
                del self._inboxes[id]

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

    # --- the thread that lives as long as the process ---

    def _live(self) -> None:
        """Start the process and pass its messages on until it ends.

        Linux kills the process when the thread that started it ends; `main` asks for that, so a worker never
        outlives the application. So it must be this thread, which does nothing but wait for the process: a
        thread of the application's, in which somebody happened to call `start`, may end at any time.
        """
        try:
            process = self._process = self._spawn()
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

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the interpreter on the very code that runs here, whatever folder or path that came from."""
        here = str(Path(__file__).resolve().parents[2])
        threads = str(self._threads)
        own = {
            "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        if sys.stderr is not None and sys.stderr.isatty():  # bars ask for it where there is no terminal
            columns, lines = os.get_terminal_size(sys.stderr.fileno())
            own |= {"COLUMNS": str(columns), "LINES": str(lines)}
        return subprocess.Popen(
            [self._python, "-P", "-m", "edge_sdk.worker.main", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | own | self._environment,
        )


class StderrTail:
    """Copies `pipe` to this process's standard error in a thread of its own, and remembers its end."""

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
                # A terminal that is gone must not stop the worker.
                with contextlib.suppress(OSError, ValueError):
                    pass_on(piece.decode(errors="replace"))


def answer_of(message: Message) -> Any:
    """The body of a reply; an error is raised as what it was on the other side."""
    kind, body = message
    if kind == "error":
        raise raised(body)
    return body
