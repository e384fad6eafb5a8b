"""The process that trains: `python -m edge_sdk.worker.main`, started by `pipe` alone.

Calls come in on its standard input and answers leave on its standard output, which are moved away first: what
a library prints goes to standard error. It ends with the application: when the pipe closes, and on Linux by a
signal even if the pipe is held open by somebody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edge_sdk.core.errors import EdgeError, InternalError
from edge_sdk.core.records import from_json, to_json
from edge_sdk.system.hidden_library import hide_bitsandbytes
from edge_sdk.system.terminal import logger
from edge_sdk.training.plan import Abandoned, Interrupted, StepAnswer, StepReport
from edge_sdk.worker.messages import Job, Question, Setup, line, parsed, problem

if TYPE_CHECKING:
    from edge_sdk.worker.worker import Worker

log = logger("edge_sdk.worker")

PR_SET_PDEATHSIG = 1
# The kernel adds this, in thousandths of all memory, to what a process takes when it looks for one to kill. A
# process with a checkpoint goes before every other: theirs may be work that nobody has saved.
OOM_SCORE = 1000

Call = tuple[str, int, Any]


class Endpoint:
    """The worker's end of the pipes: one thread listens, one works, one answers questions."""

    def __init__(self, calls: IO[bytes], answers: IO[bytes]) -> None:
        self._calls, self._answers = calls, answers
        self._writing = threading.Lock()
        self._work: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._questions: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._told: tuple[int, StepAnswer] = (0, "continue")  # the training call that a word is for
        self._worker: Worker | None = None

    def run(self) -> None:
        """Work until the pipe closes, which ends the process."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._work_off, args=(self._questions,), name="answer", daemon=True).start()
        self._work_off(self._work)

    def _listen(self) -> None:
        """Sort what comes in. When the pipe closes the application is gone: leave all as it is."""
        for raw in self._calls:
            kind, id, body = parsed(raw)
            if kind == "tell":
                self._told = (id, body)
            else:
                (self._work if kind in ("prepare", "train") else self._questions).put((kind, id, body))
        os._exit(0)

    def _work_off(self, calls: queue.SimpleQueue[Call]) -> None:
        while True:
            kind, id, body = calls.get()
            self._answer(kind, id, body)

    def _answer(self, kind: str, id: int, body: Any) -> None:
        """Do one call. The error is gone when this returns, and what it held with it."""
        try:
            reply = self._do(kind, id, body)
        except (EdgeError, Abandoned, Interrupted) as error:
            self._send("error", id, problem(error))
        except Exception as error:
            log.exception("the worker failed at %s", kind)
            self._send("error", id, problem(error))
        else:
            self._send("reply", id, reply)

    def _do(self, kind: str, id: int, body: Any) -> Any:
        if kind == "prepare":
            setup = from_json(Setup, body)
            if not setup.bitsandbytes:  # PEFT would import it wherever it finds it
                hide_bitsandbytes()
            # Takes seconds, in which the application can end already.
            from edge_sdk.worker.worker import Worker

            self._worker = Worker(setup)
            return to_json(self._worker.prepared)
        if self._worker is None:
            raise InternalError(f"{kind}: the worker is not prepared")
        if kind == "train":
            return to_json(self._worker.train(from_json(Job, body), self._on_step(id)))
        if kind == "generate":
            return self._worker.generate(from_json(Question, body), lambda text: self._send("text", id, text))
        raise InternalError(f"the worker knows no {kind}")

    def _on_step(self, id: int) -> Callable[[StepReport], StepAnswer]:
        """Report, without waiting for an answer; what was told meanwhile counts."""

        def on_step(report: StepReport) -> StepAnswer:
            self._send("step", id, to_json(report))
            for_call, word = self._told
            return word if for_call == id else "continue"

        return on_step

    def _send(self, kind: str, id: int, body: Any) -> None:
        with self._writing:
            self._answers.write(line(kind, id, body))
            self._answers.flush()


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input and output for this module alone; everybody else reads nothing and prints to stderr."""
    calls, answers = os.dup(0), os.dup(1)  # not inherited by processes that a library may start
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(calls, "rb"), os.fdopen(answers, "wb")


def _end_with(parent: int) -> None:
    """On Linux: be killed when the thread that started this process ends; it waits for this process to."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be heard
        os._exit(0)


def _go_first_when_memory_ends() -> None:
    """On Linux: have the kernel choose this process, and not the application, when memory runs out."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it; then sizes decide
            Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def main() -> int:
    """Run until the application closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the application's to handle
    _end_with(int(sys.argv[1]))
    _go_first_when_memory_ends()
    Endpoint(*_take_pipes()).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
