"""Training that somebody interrupts, or asks something in the middle: the same bits come out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from edge_sdk.core.errors import InternalError
from edge_sdk.training.adapter_places import ANSWERING, LOCAL
from edge_sdk.training.checkpoint import read_checkpoint
from edge_sdk.training.plan import Interrupted, Start, StepAnswer, StepReport, rest
from edge_sdk.training.trainer import Trainer
from tests.edge_sdk.training.test_trainer import go_on, make, plan, random_adapter, rows_of, same_bits
from tests.models import Architecture, build_model
from tests.processes import PATIENCE_S

PROMPT = "red hall"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Architecture, Path]:
    return {"llama": build_model(tmp_path_factory.mktemp("llama"), "llama")}


@pytest.fixture(scope="module")
def nf4(directories: Mapping[Architecture, Path]) -> Trainer:
    return make(directories["llama"])


def starting(it: Trainer, rule: str) -> Start:
    held = random_adapter(it, 4)
    return Start(held, None, 4, seed=5) if rule == "flexlora" else Start(None, held, 4, seed=5)


# --- answers in the middle of training --------------------------------------------------------------


@pytest.mark.parametrize("rule", ["flexlora", "carry"])
def test_an_answer_in_the_middle_changes_no_bit_of_training(nf4: Trainer, rule: str) -> None:
    rows, start = rows_of(nf4), starting(nf4, rule)
    nf4.answer_with(None)
    whole = nf4.train(start, rows, plan(6), on_step=go_on)
    served = random_adapter(nf4, 6, seed=9, size=0.2)
    expected = nf4.generate(served, [PROMPT], 8)[0]
    assert expected != nf4.generate(None, [PROMPT], 8)[0]
    said: list[str] = []

    def ask(report: StepReport) -> StepAnswer:
        if report.step in (2, 4):  # a new version is put in place, and another one later
            nf4.answer_with(served if report.step == 4 else random_adapter(nf4, 3))
        with nf4.answering():
            said.append(nf4.answer(PROMPT, 8))
        return "continue"

    asked = nf4.train(start, rows, plan(6), on_step=ask)
    assert same_bits(asked.adapter, whole.adapter)
    assert asked.loss_after == whole.loss_after
    assert said[3:] == [expected] * 3
    assert said[0] == nf4.generate(None, [PROMPT], 8)[0]
    # What was put in place is there after the run, and plain evaluation does without it.
    with nf4.answering():
        assert nf4.answer(PROMPT, 8) == expected
    assert nf4.generate(None, [PROMPT], 8)[0] == said[0]


def test_gradients_and_active_adapters_are_as_before(nf4: Trainer) -> None:
    places = nf4.places
    with places.installed({LOCAL: random_adapter(nf4, 4)}):
        nf4.loss_sum(rows_of(nf4)[:4]).backward()
        before = {n: (p.requires_grad, p.grad) for n, p in places.trainable().items()}
        nf4.answer_with(random_adapter(nf4, 2))
        with nf4.answering():
            assert not any(p.requires_grad for p in places.trainable().values())
            nf4.answer(PROMPT, 2)
        after = {n: (p.requires_grad, p.grad) for n, p in places.trainable().items()}
        assert all(after[n][0] and after[n][1] is before[n][1] for n in before)
        frozen = [
            n for n, p in nf4.base.model.named_parameters() if f".{ANSWERING}." in n and p.requires_grad
        ]
        assert frozen == []
    nf4.answer_with(None)
    assert not [n for n, _ in nf4.base.model.named_parameters() if ANSWERING in n]


def test_an_answer_waits_for_one_step_and_training_for_the_answer(nf4: Trainer) -> None:
    """An answer from another thread, asked for within a step, comes between that step and the next."""
    order: list[str] = []
    thread = threading.Thread(target=lambda: order.append(ask()))
    step = nf4.step

    def ask() -> str:
        with nf4.answering():
            nf4.answer(PROMPT, 4)
            order.append("answering")
        return "answered"

    def slow_step(run: object, rows: object) -> float:
        order.append("step")
        if not thread.ident:
            thread.start()
            while not nf4.lock.waiting:
                pass
        return step(run, rows)  # type: ignore[arg-type]

    nf4.step = slow_step  # type: ignore[method-assign]
    try:
        nf4.train(Start(None, None, 2, seed=1), rows_of(nf4), plan(3), on_step=go_on)
    finally:
        del nf4.step  # type: ignore[method-assign]
    thread.join(PATIENCE_S)
    assert order[:2] == ["step", "answering"]
    assert order.count("step") == 3


def test_an_answer_in_pieces_is_the_same_answer(nf4: Trainer) -> None:
    pieces: list[str] = []
    nf4.answer_with(random_adapter(nf4, 4, size=0.3))
    with nf4.answering():
        whole = nf4.answer(PROMPT, 24)
        assert nf4.answer(PROMPT, 24, pieces.append) == whole
    assert "".join(pieces) == whole
    nf4.answer_with(None)


def test_one_run_at_a_time(nf4: Trainer) -> None:
    def evaluate(_: StepReport) -> StepAnswer:
        with pytest.raises(InternalError, match="the model is busy with local"):
            nf4.evaluate(None, rows_of(nf4))
        return "continue"

    done = nf4.train(Start(None, None, 2, seed=1), rows_of(nf4), plan(2), on_step=evaluate)
    assert done.steps == 2


# --- interruptions ----------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_bits(
    nf4: Trainer, directories: Mapping[Architecture, Path], tmp_path: Path
) -> None:
    """Interrupted long before a checkpoint is due, and gone on with by a base that was loaded anew."""
    rows, start, path = rows_of(nf4), starting(nf4, "carry"), tmp_path / "checkpoint.safetensors"
    whole = nf4.train(start, rows, plan(7), on_step=go_on)
    told = plan(7, checkpoint_s=3600.0)

    def leave(report: StepReport) -> StepAnswer:
        return "interrupt" if report.step == 3 else "continue"

    with pytest.raises(Interrupted):
        nf4.train(start, rows, told, on_step=leave, checkpoint=path)
    again, steps = make(directories["llama"]), []

    def count(report: StepReport) -> StepAnswer:
        steps.append(report.step)
        return "continue"

    resumed = again.train(start, rows, told, on_step=count, checkpoint=path)
    assert steps == [4, 5, 6, 7]
    assert same_bits(resumed.adapter, whole.adapter)
    assert torch.equal(torch.tensor(resumed.loss_after), torch.tensor(whole.loss_after))


def test_after_the_last_step_there_is_nothing_to_interrupt(nf4: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"

    def leave(report: StepReport) -> StepAnswer:
        return "interrupt" if report.step == 2 else "continue"

    done = nf4.train(Start(None, None, 2, seed=1), rows_of(nf4), plan(2), on_step=leave, checkpoint=path)
    assert done.steps == 2
    assert read_checkpoint(path, {}) is None


def test_a_rest_hears_an_interruption() -> None:
    assert rest(float("inf"), StepReport(1, 9, 0.0, 4, 1.0), lambda _: "interrupt") == "interrupt"
