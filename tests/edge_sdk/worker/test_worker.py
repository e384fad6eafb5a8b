"""Training in a process of its own: what it answers, and that the application outlives whatever ends it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import AdapterError, EdgeError, InputError, OutOfMemory, WorkerDied
from edge_sdk.model import base_model
from edge_sdk.training.plan import Abandoned, Interrupted, Plan, StepAnswer, StepReport
from edge_sdk.worker.messages import Finished, Job, Question, Setup
from edge_sdk.worker.process import WorkerProcess
from edge_sdk.worker.training_call import Patience
from edge_sdk.worker.worker import Worker
from tests import memory_limits
from tests.models import build_larger_llama, build_model
from tests.processes import PATIENCE_S, ROOT, environment, workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

SCALING = 2.0

LIMIT_BYTES = 64 << 20  # for all that training takes on top of a loaded base

# Every activation gets a mapping of its own, which ends when it is freed: a step maps what it needs.
NO_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"}


def setup_of(directory: Path, words: int = 4) -> Setup:
    data = directory / "data.jsonl"
    rows = [{"prompt": f"{n} is", "completion": " ".join(["red"] * words + [str(n)])} for n in range(24)]
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    modules = base_model.describe(str(directory)).modules
    return Setup(str(directory), modules, SCALING, "int8", str(data), device="cpu", quantise=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return setup_of(build_model(tmp_path_factory.mktemp("small"), "llama"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return setup_of(build_larger_llama(tmp_path_factory.mktemp("large")), words=600)


@pytest.fixture(scope="module")
def worker(small: Setup) -> Iterator[WorkerProcess]:
    with WorkerProcess(small) as process:
        assert process.prepare().examples == 24
        yield process


def job_in(folder: Path, steps: int, ranks: Ranks | None = None, **changes: Any) -> Job:
    plan: dict[str, Any] = {"batch": 4, "micro_batch": 4, "sequence_len": 64, "learning_rate": 5e-3}
    return Job(
        ranks or Ranks.uniform(4),
        seed=1,
        plan=Plan(steps=steps, **plan | {"checkpoint_s": 0.0} | changes),
        checkpoint=str(folder / "checkpoint"),
        outbox=str(folder / "outbox"),
    )


def go_on(_: StepReport) -> StepAnswer:
    return "continue"


# --- what it does ---------------------------------------------------------------------------------


def test_it_trains_from_files_into_files(worker: WorkerProcess, tmp_path: Path) -> None:
    seen: list[StepReport] = []

    def note(report: StepReport) -> StepAnswer:
        seen.append(report)
        return "continue"

    done = worker.train(job_in(tmp_path, 12, Ranks(attention=2, mlp=5)), note)
    assert sorted({report.step for report in seen}) == list(range(1, 13))
    assert (done.steps, done.examples, done.rank) == (12, 48, 5)
    assert (done.loss_before, done.loss_after) == (seen[0].loss, seen[-1].loss)
    assert done.loss_after < done.loss_before
    outbox = tmp_path / "outbox"
    assert (done.digest, done.size_bytes) == (codec.sha256_file(outbox), outbox.stat().st_size)
    assert b".lora_A.int8" in outbox.read_bytes()[:400]  # the dtype that the federation wants
    ranks = codec.open_own(outbox, SCALING).ranks
    assert {rank for name, rank in ranks.items() if "self_attn" in name} == {2}
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {5}
    assert 0 < done.memory.framework_bytes < done.memory.peak_bytes
    assert done.memory.resident_bytes > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the score is Linux's")
def test_the_kernel_takes_it_before_the_application(worker: WorkerProcess) -> None:
    assert worker.generate(Question(("1 is",), 1))  # it lives
    scores = {Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in workers()}
    assert scores == {"1000"}


def test_a_larger_adapter_file_is_cut_to_the_job(worker: WorkerProcess, tmp_path: Path) -> None:
    worker.train(job_in(tmp_path, 2, Ranks.uniform(8)), go_on)
    given = (tmp_path / "outbox").rename(tmp_path / "given")
    held = replace(job_in(tmp_path / "a", 1), adapter=str(given))
    (tmp_path / "a").mkdir()
    assert worker.train(held, go_on).rank == 4
    carried = replace(job_in(tmp_path / "a", 1), carried=str(given), carry_rank=3)
    assert worker.train(carried, go_on).rank == 4


def test_words_are_heard_between_steps(worker: WorkerProcess, tmp_path: Path) -> None:
    def at(step: int, word: StepAnswer) -> Any:
        return lambda report: word if report.step >= step else "continue"

    with pytest.raises(Abandoned):
        worker.train(job_in(tmp_path, 5000), at(2, "abandon"))
    with pytest.raises(Interrupted):
        worker.train(job_in(tmp_path, 5000), at(3, "interrupt"))
    before = (tmp_path / "checkpoint").read_bytes()
    done = worker.train(job_in(tmp_path, 5000), at(4, "finish"))
    assert before
    assert 4 <= done.steps < 5000
    told = threading.Event()
    teller = threading.Timer(0.3, told.set)
    teller.start()
    with pytest.raises(Interrupted):
        worker.train(job_in(tmp_path, 5000), lambda _: "interrupt" if told.is_set() else "continue")
    # A word belongs to the training that it was said to.
    (tmp_path / "checkpoint").unlink()
    assert worker.train(job_in(tmp_path, 3), go_on).steps == 3


def test_it_answers_while_it_trains(worker: WorkerProcess, tmp_path: Path) -> None:
    said: list[list[str]] = []
    pieces: list[str] = []

    def ask() -> None:
        said.append(worker.generate(Question(("1 is",), 6), pieces.append))

    asker = threading.Thread(target=ask)
    asker.start()
    done = worker.train(job_in(tmp_path, 100_000), lambda _: "finish" if said else "continue")
    asker.join()
    assert done.steps < 100_000
    assert said == [worker.generate(Question(("1 is",), 6))]
    assert "".join(pieces) == said[0][0]
    tuned = worker.generate(Question(("1 is", "2 is"), 6, str(tmp_path / "outbox")))
    assert len(tuned) == 2


def test_errors_cross_the_pipe_as_what_they_are(worker: WorkerProcess, tmp_path: Path) -> None:
    job = job_in(tmp_path, 3)
    with pytest.raises(InputError, match="diverged at step 2 .* lower the learning rate, now 1e[+]30"):
        worker.train(replace(job, plan=replace(job.plan, learning_rate=1e30)), go_on)
    (tmp_path / "nonsense").write_bytes(b"\x08")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        worker.train(replace(job, adapter=str(tmp_path / "nonsense")), go_on)
    with pytest.raises(EdgeError, match="FileNotFoundError"):
        worker.generate(Question(("x",), 2, str(tmp_path / "missing")))

    def fail(_: StepReport) -> StepAnswer:
        raise KeyError("the application's own")

    with pytest.raises(KeyError):  # and nobody trains on for nothing
        worker.train(replace(job, plan=replace(job.plan, steps=100_000)), fail)
    assert worker.train(job_in(tmp_path, 2), go_on).steps == 2


def test_what_cannot_start_says_so(small: Setup, tmp_path: Path) -> None:
    with (
        WorkerProcess(small, python=str(tmp_path / "none")) as process,
        pytest.raises(InputError, match="none"),
    ):
        process.prepare()
    with pytest.raises(InputError, match="gone"):
        Worker(replace(small, model=str(tmp_path / "gone")))


# --- what ends it ---------------------------------------------------------------------------------


def prepared(process: WorkerProcess) -> int:
    """Prepare a worker; its process id."""
    others = workers()
    process.prepare()
    (pid,) = workers() - others
    return pid


def train_until(process: WorkerProcess, pid: int, job: Job, step: int, number: signal.Signals) -> Finished:
    """Send a signal when a step is reported."""

    def strike(report: StepReport) -> StepAnswer:
        if report.step == step and lives(pid):
            os.kill(pid, number)
        return "continue"

    return process.train(job, strike)


def test_killed_at_random_times_the_work_is_the_same_in_the_end(
    worker: WorkerProcess, small: Setup, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = worker.train(job_in(tmp_path / "whole", 60), go_on)
    files, draw = open_files(), random.Random()
    job = job_in(tmp_path, 60)
    with WorkerProcess(small) as process:
        pid = prepared(process)
        with pytest.raises(OutOfMemory, match="killed by the system, probably out of memory") as killed:
            train_until(process, pid, job, draw.randint(1, 20), signal.SIGKILL)
        assert killed.value.details["step"] >= 1
        assert "4 × 64 tokens at a time" in killed.value.details["setting"]
        with pytest.raises(OutOfMemory):  # and so does everybody who asks later
            process.generate(Question(("x",), 2))
    with WorkerProcess(small) as process:
        pid = prepared(process)
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            train_until(process, pid, job, draw.randint(25, 40), signal.SIGSEGV)
        assert pid not in workers()
        assert pid not in [child.pid for child in psutil.Process().children()]  # no zombie
    with WorkerProcess(small) as process:
        process.prepare()
        seen: list[int] = []
        done = process.train(job, lambda report: (seen.append(report.step), "continue")[1])
        assert seen[0] > 1
    assert done.digest == whole.digest
    assert open_files() == files


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def test_one_that_hangs_is_ended(small: Setup, tmp_path: Path) -> None:
    files = open_files()
    with WorkerProcess(small) as process:
        pid = prepared(process)
        began = time.monotonic()
        with pytest.raises(Interrupted):  # a step that does not end is not waited for
            process.train(job_in(tmp_path, 5000), stop_process_then("interrupt", pid))
        assert time.monotonic() - began < PATIENCE_S
        assert pid not in workers()
        with pytest.raises(WorkerDied, match="was ended: it was told to interrupt"):
            process.generate(Question(("x",), 2))
    assert open_files() == files


def test_one_that_says_nothing_while_it_loads_is_ended(small: Setup) -> None:
    others = workers()

    def stop() -> None:
        for pid in workers() - others:
            os.kill(pid, signal.SIGSTOP)

    with WorkerProcess(small, patience=Patience(silence_s=1.0)) as process:
        stopper = threading.Timer(0.2, stop)
        stopper.start()
        with pytest.raises(WorkerDied, match="it said nothing for 1 s"):
            process.prepare()


def stop_process_then(word: StepAnswer, pid: int) -> Any:
    """Freeze the worker in its third step, then answer with a word that it cannot hear."""

    def on_step(report: StepReport) -> StepAnswer:
        if report.step < 3:
            return "continue"
        os.kill(pid, signal.SIGSTOP)
        return word

    return on_step


PARENT = """
import os, psutil, sys, threading, time
from edge_sdk.worker.messages import Setup
from edge_sdk.worker.process import WorkerProcess
process = WorkerProcess(Setup(sys.argv[1], {}, 1.0))
threading.Thread(target=process.prepare, daemon=True).start()
while not (children := psutil.Process().children()): time.sleep(0.01)
time.sleep(1.0)
if sys.argv[2] == "held" and os.fork() == 0:  # somebody else keeps the worker's pipe open
    os.write(1, b"held %d\\n" % os.getpid()); time.sleep(60); os._exit(0)
os.write(1, b"worker %d\\n" % children[0].pid)
time.sleep(60)
"""


@pytest.mark.parametrize("pipe", ["closed", "held"])
def test_it_ends_with_the_application(small: Setup, pipe: str) -> None:
    if pipe == "held" and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent has died")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, small.model, pipe],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    pids: dict[str, int] = {}
    while len(pids) < (2 if pipe == "held" else 1):
        name, pid = parent.stdout.readline().split()
        pids[name] = int(pid)
    assert lives(pids["worker"])
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + PATIENCE_S
    while lives(pids["worker"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(pids["worker"])
    if pipe == "held":
        os.kill(pids["held"], signal.SIGKILL)
    parent.stdout.close()


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- limits that the kernel enforces --------------------------------------------------------------


def long_job(folder: Path, **changes: Any) -> Job:
    """Eight rows of 512 tokens at once need more than LIMIT_BYTES, one of 128 tokens a small part of it."""
    return job_in(folder, 4, **{"sequence_len": 512, "batch": 8, "micro_batch": 8} | changes)


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_an_allocation_that_fails_leaves_the_last_good_step(large: Setup, tmp_path: Path) -> None:
    with WorkerProcess(large, NO_HEAP) as process:
        pid = prepared(process)
        limit = memory_limits.address_space_bytes(pid) + LIMIT_BYTES
        reached: list[int] = []

        def narrow(report: StepReport) -> StepAnswer:
            if not reached:
                memory_limits.limit_address_space(pid, limit)
            reached.append(report.step)
            return "continue"

        # A checkpoint is due only after a minute: the one that is found was written when memory had run out.
        with pytest.raises(OutOfMemory, match="allocate") as failed:
            process.train(long_job(tmp_path, checkpoint_s=60.0), narrow)
        assert failed.value.details["step"] == max(reached) < 4
        assert (tmp_path / "checkpoint").exists()
        seen: list[int] = []
        smaller = long_job(tmp_path, ranks=Ranks.uniform(2), micro_batch=1, sequence_len=128)
        done = process.train(smaller, lambda r: (seen.append(r.step), "continue")[1])
        assert seen[0] == max(reached) + 1
        assert (done.rank, done.steps, done.examples) == (2, 4, 32)
        assert memory_limits.address_space_bytes(pid) <= limit


def test_one_that_the_kernel_kills_is_outlived(large: Setup, tmp_path: Path) -> None:
    with memory_limits.cgroup(LIMIT_BYTES) as group:
        with WorkerProcess(large, NO_HEAP) as process:
            pid = prepared(process)

            def narrow(report: StepReport) -> StepAnswer:
                if lives(pid):
                    group.take_in(pid)
                return "continue"

            with pytest.raises(OutOfMemory, match="killed by the system") as killed:
                process.train(long_job(tmp_path), narrow)
        assert group.kills() == 1
        step = killed.value.details["step"]
        assert 1 <= step < 4
        with WorkerProcess(large, NO_HEAP) as process:
            group.take_in(prepared(process))
            smaller = long_job(tmp_path, ranks=Ranks(attention=1, mlp=3), micro_batch=1, sequence_len=128)
            seen: list[int] = []
            done = process.train(smaller, lambda r: (seen.append(r.step), "continue")[1])
        assert seen[0] == step + 1
        assert (done.rank, done.steps, done.examples) == (3, 4, 32)
        assert group.kills() == 1
