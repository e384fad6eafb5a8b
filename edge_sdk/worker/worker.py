"""What runs beside the model in a process of its own: it loads, trains from files into files, and answers.

`main` is the process, `process` the application's side of it. The class needs neither.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.errors import Unwritable
from edge_sdk.core.lora import Adapter, max_rank
from edge_sdk.model import base_model
from edge_sdk.system import priority, process_memory
from edge_sdk.system.backoff import Backoff
from edge_sdk.system.durable import write_durably
from edge_sdk.system.out_of_memory import caught, out_of_memory
from edge_sdk.text.rows import Tokenised, load_examples, tokenise
from edge_sdk.training.plan import (
    REST_SLICE_S,
    Abandoned,
    Interrupted,
    Start,
    StepAnswer,
    StepReport,
    Trained,
)
from edge_sdk.training.trainer import Trainer
from edge_sdk.worker.messages import Finished, Job, Memory, Prepared, Question, Setup


class Worker:
    """One loaded base with the device's data. `train` in one thread, `generate` in another if need be.

    `trainer` has the base; it is gone after `close`.

    Raises:
        InputError: no such model, device or data.
        OutOfMemory: there is no room for the base itself.
    """

    def __init__(self, setup: Setup) -> None:
        began = time.monotonic()
        self._setup = setup
        base_model.use_threads(setup.threads)
        base_model.import_libraries()
        _ready_for_scarcity()
        self._framework_bytes = 0
        if setup.alone:
            priority.lower_process(setup.niceness)
            self._framework_bytes = process_memory.resident_bytes()
        self._examples = load_examples(Path(setup.data)) if setup.data else []
        self._rows: tuple[int, list[Tokenised]] = (0, [])
        self._asking = threading.Lock()
        self._answers_with: str | None = None
        if failure := caught(self._load):
            raise out_of_memory(0, f"loading {setup.model}", failure)
        self.prepared = Prepared(len(self._examples), time.monotonic() - began, self.memory())

    def _load(self) -> None:
        setup = self._setup
        base = base_model.load(
            setup.model,
            device=setup.device,
            quantise=setup.quantise,
            trust_remote_code=setup.trust_remote_code,
        )
        base_model.release_memory()
        self.trainer = Trainer(base, setup.modules, setup.scaling, setup.progress)

    # --- training ---

    def train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        """Train an assignment from its checkpoint to its outbox. `on_step` as in `Trainer.train`.

        Raises:
            Abandoned, Interrupted: `on_step` said so.
            OutOfMemory: the checkpoint holds the last good step; a smaller job goes on from there.
            InputError, AdapterError: as `Trainer.train`.
        """
        finished: list[Finished] = []
        last = 0

        def note(report: StepReport) -> StepAnswer:
            nonlocal last
            last = report.step
            return on_step(report)

        # The trainer reports what happens in its steps; this is for what comes before and after them.
        if failure := caught(lambda: finished.append(self._train(job, note))):
            raise out_of_memory(last, job.plan.described(job.ranks), failure)
        return finished[0]

    def _train(self, job: Job, on_step: Callable[[StepReport], StepAnswer]) -> Finished:
        self._begin_peak()
        adapter = self._cut(job.adapter, job.ranks)
        carried = self._cut(job.carried, Ranks.uniform(job.carry_rank) if job.carry_rank else None)
        start = Start(adapter, carried, job.ranks, job.seed, job.carried_dtype)
        rows = self.rows_of(job.plan.sequence_len)
        done = self.trainer.train(start, rows, job.plan, on_step=on_step, checkpoint=Path(job.checkpoint))
        content = codec.encode(done.adapter, self._setup.scaling, self._setup.upload_dtype)
        self._put(Path(job.outbox), content, done, job.plan.steps, on_step)
        return Finished(
            rank=max_rank(done.adapter),
            digest=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            examples=done.examples,
            steps=done.steps,
            loss_before=done.loss_before,
            loss_after=done.loss_after,
            seconds=done.seconds,
            memory=self.memory(),
        )

    @staticmethod
    def _put(
        path: Path, content: bytes, done: Trained, steps: int, on_step: Callable[[StepReport], StepAnswer]
    ) -> None:
        """Write the finished adapter. Where the disk is full it waits here until there is room.

        Raises:
            Abandoned, Interrupted: `on_step`, asked every half second, said so. What follows the last
                checkpoint is trained again then.
        """
        backoff = Backoff()
        while True:
            try:
                write_durably(path, content)
                return
            except Unwritable as error:
                report = StepReport(
                    done.steps, steps, done.loss_after, done.examples, done.seconds, str(error)
                )
            until = time.monotonic() + backoff.next_s()
            while (left := until - time.monotonic()) > 0:
                answer = on_step(report)
                if answer in ("abandon", "interrupt"):
                    raise Abandoned if answer == "abandon" else Interrupted
                time.sleep(min(left, REST_SLICE_S))

    def _cut(self, path: str | None, ranks: Ranks | None) -> Adapter | None:
        """An adapter file with the leading components of every module; None for no file.

        A served file holds components by falling size, so that these are what it would hold at that rank.
        """
        if path is None:
            return None
        modules = codec.open_own(Path(path), self._setup.scaling).modules()
        return {name: factors.leading(ranks.of(name)) if ranks else factors for name, factors in modules}

    def rows_of(self, sequence_len: int) -> Sequence[Tokenised]:
        """The data in tokens, cut to a length; the last length is kept."""
        if self._rows[0] != sequence_len:
            tokenizer = self.trainer.base.tokenizer
            self._rows = (sequence_len, [tokenise(e, tokenizer, sequence_len) for e in self._examples])
        return self._rows[1]

    # --- asking ---

    def generate(self, question: Question, on_text: Callable[[str], None] | None = None) -> list[str]:
        """Greedy answers. While another thread trains, each prompt takes a turn between two steps.

        Raises:
            OutOfMemory: an answer found no room; training in the other thread is not touched by that.
        """
        answers: list[str] = []
        with self._asking:
            if failure := caught(lambda: self._answer(question, answers, on_text)):
                raise out_of_memory(0, f"answering in {question.max_new_tokens} tokens", failure)
        return answers

    def _answer(self, question: Question, answers: list[str], on_text: Callable[[str], None] | None) -> None:
        if question.adapter != self._answers_with:
            self.trainer.answer_with(self._cut(question.adapter, None))
            self._answers_with = question.adapter
        for prompt in question.prompts:
            with self.trainer.answering():
                answers.append(self.trainer.answer(prompt, question.max_new_tokens, on_text))

    def close(self) -> None:
        """Let go of the base."""
        del self.trainer
        base_model.release_memory()

    # --- memory ---

    def memory(self) -> Memory:
        """What this process holds, and held at most since the last training began."""
        on_cuda = torch.cuda.is_available() and self.trainer.base.device.type == "cuda"
        device = self.trainer.base.device
        return Memory(
            self._framework_bytes,
            process_memory.resident_bytes(),
            process_memory.peak_bytes(),
            torch.cuda.max_memory_allocated(device) if on_cuda else 0,
            torch.cuda.max_memory_reserved(device) if on_cuda else 0,
        )

    def _begin_peak(self) -> None:
        process_memory.reset_peak()
        if self.trainer.base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.trainer.base.device)


def _ready_for_scarcity() -> None:
    """Let numpy's BLAS take its buffers now: it ends the process when it finds no room for them.

    They are needed to go on at a lower rank, which is when memory has just run out.
    """
    square = np.eye(256, dtype=np.float32)
    np.linalg.svd(square @ square)
