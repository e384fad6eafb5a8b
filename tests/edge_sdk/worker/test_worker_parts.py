"""How a process ended, in words; what counts as lack of memory; errors through the pipe."""

from __future__ import annotations

import errno
import json
import signal

import pytest
import torch

from edge_sdk.core.errors import EdgeError, InputError, OutOfMemory, ProtocolError, subclasses
from edge_sdk.system.child_process import ending_of
from edge_sdk.system.out_of_memory import caught, means_out_of_memory, out_of_memory
from edge_sdk.system.process_memory import peak_bytes, reset_peak, resident_bytes
from edge_sdk.training.plan import Abandoned, Interrupted, Plan
from edge_sdk.training.run import CheckpointSchedule, Run
from edge_sdk.worker.messages import line, parsed, problem, raised


@pytest.mark.parametrize(
    ("code", "stderr", "reason", "memory"),
    [
        (-signal.SIGKILL, "", "killed by the system, probably out of memory", True),
        (-signal.SIGSEGV, "", "ended by signal SIGSEGV", False),
        (-signal.SIGILL, "loading\n", "ended by signal SIGILL; its last words: loading", False),
        (-signal.SIGABRT, "terminate called after throwing 'std::bad_alloc'\n", "signal SIGABRT; its", True),
        (-200, "", "ended by signal 200", False),
        (1, "Error out of memory at line 380 in file x.cu\n", "exit code 1; its last words: Error out", True),
        (1, "10%\r20%\rKeyError: 'x'\n\n", "exit code 1; its last words: KeyError: 'x'", False),
        (0, "CUDA out of memory, once, and caught", "exit code 0; its", False),
        (0xC0000017, "", "ended by the system, out of memory", True),
    ],
)
def test_an_ending_in_words(code: int, stderr: str, reason: str, memory: bool) -> None:
    ending = ending_of(code, stderr)
    assert reason in ending.reason
    assert ending.memory is memory


def test_torchs_own_failure_to_allocate_is_known() -> None:
    said = caught(lambda: torch.empty(1 << 50))
    assert said is not None
    assert "memory" in said


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (ImportError("libx.so: failed to map segment: Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (InputError("line 3: 'out of memory' is no number"), False),
        (KeyboardInterrupt("out of memory"), False),
    ],
)
def test_what_means_that_memory_ran_out(error: BaseException, memory: bool) -> None:
    assert means_out_of_memory(error) is memory


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        caught(lambda: print(1 // 0))
    assert caught(lambda: None) is None


@pytest.mark.parametrize("kind", subclasses(EdgeError), ids=lambda kind: kind.__name__)
def test_every_error_crosses_the_pipe(kind: type[EdgeError]) -> None:
    _, _, body = parsed(line("error", 3, problem(kind("no such thing", step=4))))
    back = raised(body)
    assert type(back) is kind
    assert isinstance(back, EdgeError)
    assert (str(back), back.details) == ("no such thing", {"step": 4})


def test_outcomes_cross_the_pipe_too() -> None:
    assert isinstance(raised(problem(Abandoned())), Abandoned)
    assert isinstance(raised(problem(Interrupted())), Interrupted)
    assert "KeyError: 'x'" in str(raised(problem(KeyError("x"))))
    told = raised(problem(out_of_memory(7, "rank 8", "can't allocate")))
    assert isinstance(told, OutOfMemory)
    assert told.details == {"step": 7, "setting": "rank 8", "reason": "can't allocate"}


@pytest.mark.parametrize("raw", [b"hello\n", b"[1]\n", b'{"kind": "step"}\n', json.dumps({}).encode()])
def test_a_line_that_is_no_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="the worker's pipe holds no message"):
        parsed(raw)


def test_the_peak_of_this_process_follows_what_it_takes() -> None:
    if not reset_peak():
        pytest.skip("the peak cannot be reset here")
    before = peak_bytes()
    held = bytearray(b"x" * (64 << 20))
    del held
    assert peak_bytes() >= before + (60 << 20)
    assert peak_bytes() >= resident_bytes()


def test_a_step_that_fails_in_the_middle_of_an_update_writes_nothing() -> None:
    """Half of the parameters are of the next step then: the checkpoint before is what counts."""
    written: list[str] = []
    parameter = torch.nn.Parameter(torch.ones(2))
    run = Run({"x.a": parameter}, Plan(3, 1, 1, 8, 1e-3))
    parameter.grad = torch.ones(2)
    run.update()
    run.advance(1.0, 1, 0.1)
    run.rescue(CheckpointSchedule(lambda: written.append("whole"), 30.0))

    def fail() -> None:
        raise MemoryError

    run.optimizer.register_step_post_hook(lambda *_: fail())
    parameter.grad = torch.ones(2)
    assert caught(run.update) == "MemoryError"
    run.rescue(CheckpointSchedule(lambda: written.append("torn"), 30.0))
    assert written == ["whole"]
