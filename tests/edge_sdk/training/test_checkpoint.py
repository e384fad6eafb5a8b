"""Going on at a smaller setting: what is kept, what starts anew, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import Adapter, LoraFactors
from edge_sdk.model import base_model
from edge_sdk.text.examples import parse_record
from edge_sdk.text.rows import Tokenised, tokenise
from edge_sdk.training.checkpoint import Checkpoint, Progress, may_continue, refitted
from edge_sdk.training.plan import Interrupted, Plan, Start, StepAnswer, StepReport, Trained, identity
from edge_sdk.training.trainer import Trainer
from tests.models import build_model

SCALING = 2.0
PAIRS = [(f"{a} {b}", f"{b[0]}{a[0]}") for a in ("red", "green", "blue") for b in ("hall", "cellar", "attic")]


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    directory = str(build_model(tmp_path_factory.mktemp("llama"), "llama"))
    base = base_model.load(directory, device="cpu", quantise=False, dtype="float32")
    return Trainer(base, base_model.describe(directory).modules, SCALING, progress=False)


def rows(it: Trainer, length: int = 64) -> list[Tokenised]:
    records = [parse_record({"prompt": p, "completion": c}) for p, c in PAIRS]
    return [tokenise(record, it.base.tokenizer, length) for record in records]


def plan(steps: int, **changes: Any) -> Plan:
    given: dict[str, Any] = {"batch": 3, "micro_batch": 3, "sequence_len": 64, "learning_rate": 5e-3}
    return Plan(steps=steps, **given | changes)


def factors_of(shape: tuple[int, int], rank: int, seed: int) -> LoraFactors:
    draw = np.random.default_rng(seed)
    b, a = draw.standard_normal((shape[0], rank)), draw.standard_normal((rank, shape[1]))
    return LoraFactors(b.astype(np.float32), a.astype(np.float32))


def served(it: Trainer, rank: int) -> dict[str, LoraFactors]:
    """Components by falling size, as the coordinator serves them, cut to `rank`."""
    shapes = {name: factors.shape for name, factors in empty(it).items()}
    whole = {name: combine([(0.01, factors_of(s, 12, 5))], 12).factors for name, s in shapes.items()}
    return {name: factors.leading(rank) for name, factors in whole.items()}


def empty(it: Trainer) -> Mapping[str, LoraFactors]:
    found = it.train(
        Start(None, None, 1, 1), rows(it), plan(1, learning_rate=0.0), on_step=lambda _: "continue"
    )
    return found.adapter


def ranks_of(adapter: Adapter) -> dict[str, int]:
    return {name.rsplit(".", 1)[1]: factors.rank for name, factors in adapter.items()}


# --- what may be continued ------------------------------------------------------------------------

MARKS = {"seed": 1, "ranks": "8", "sequence_len": 64, "text": "t", "factors": "f", "origin": "o", "steps": 9}


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"ranks": "4", "factors": "g"}, True),
        ({"ranks": "attention=8,mlp=2", "factors": "g"}, True),
        ({"ranks": "attention=2,mlp=16", "factors": "g"}, False),
        ({"ranks": "16", "factors": "g"}, False),
        ({"sequence_len": 32, "text": "u"}, True),
        ({"sequence_len": 128, "text": "u"}, False),
        ({"text": "u"}, False),
        ({"optimizer": "adamw8bit"}, True),
        ({"seed": 2}, False),
        ({"steps": 8}, False),
        ({"origin": "p", "ranks": "4"}, False),
        ({"ranks": "many"}, False),
        ({"unheard": "of"}, False),
    ],
)
def test_a_smaller_setting_of_the_same_assignment_may_go_on(changes: dict[str, Any], may: bool) -> None:
    assert may_continue(MARKS, MARKS | changes) is may


def test_a_checkpoint_of_an_earlier_form_is_not_continued() -> None:
    assert not may_continue({"seed": 1, "rank": 8}, MARKS)
    assert not may_continue({}, MARKS)


def test_one_adapter_cut_at_two_ranks_has_one_origin(it: Trainer) -> None:
    def marks(start: Start, adapter: Adapter) -> dict[str, Any]:
        return identity(start, adapter, rows(it), plan(4), SCALING)

    wide, narrow = served(it, 8), served(it, 3)
    one = marks(Start(wide, None, 8, 1), wide)
    other = marks(Start(narrow, None, 3, 1), narrow)
    assert one["origin"] == other["origin"]
    assert one["factors"] != other["factors"]
    stranger = {name: LoraFactors(2 * f.b, f.a) for name, f in narrow.items()}
    assert marks(Start(stranger, None, 3, 1), stranger)["origin"] != one["origin"]


# --- what becomes of the tensors ------------------------------------------------------------------


def test_the_product_is_kept_as_well_as_the_rank_allows() -> None:
    before = factors_of((10, 7), 5, seed=3)
    kept = Checkpoint(
        {"ranks": "5"},
        Progress(4, 12, 3.0, 2.0, 1.5),
        {"x.b": before.b, "x.a": before.a, "x.b.m": before.b, "x.b.v": before.b},
    )
    progress, tensors = refitted(kept, {"ranks": "2", "seed": 1}, {"x": factors_of((10, 7), 2, seed=0)})
    assert progress == Progress(4, 12, 3.0, 2.0, 1.5, adam_since=4)
    assert sorted(tensors) == ["x.a", "x.b"]
    sigmas = np.linalg.svd(before.product().astype(np.float64), compute_uv=False)
    lost = np.linalg.norm(before.product() - tensors["x.b"] @ tensors["x.a"])
    assert math.isclose(lost, math.sqrt(float(np.sum(sigmas[2:] ** 2))), rel_tol=1e-5)  # Eckart–Young


def test_components_that_learnt_nothing_are_replaced_by_fresh_ones() -> None:
    """After few steps B has fewer directions than the rank; a dead component never gets a gradient."""
    before = factors_of((10, 7), 5, seed=3)
    before.b[:, 1:] = 0
    kept = Checkpoint({"ranks": "5"}, Progress(1, 3, 3.0, 3.0, 0.1), {"x.b": before.b, "x.a": before.a})
    _, tensors = refitted(kept, {"ranks": "3", "seed": 1}, {"x": factors_of((10, 7), 3, seed=0)})
    np.testing.assert_allclose(tensors["x.b"] @ tensors["x.a"], before.product(), atol=1e-5)
    assert not tensors["x.b"][:, 1:].any()
    assert np.abs(tensors["x.a"][1:]).sum(axis=1).min() > 0


# --- training goes on -----------------------------------------------------------------------------


def cut(it: Trainer, start: Start, path: Path, steps: int = 8, at: int = 4, **changes: Any) -> Trained | None:
    """Train `at` of `steps` steps and leave off."""

    def stop(report: StepReport) -> StepAnswer:
        return "interrupt" if report.step == at else "continue"

    run = plan(steps, **changes)
    with pytest.raises(Interrupted):
        it.train(start, rows(it, run.sequence_len), run, on_step=stop, checkpoint=path)
    return None


def go_on(it: Trainer, start: Start, path: Path, steps: int = 8, **changes: Any) -> tuple[Trained, list[int]]:
    seen: list[int] = []

    def note(report: StepReport) -> StepAnswer:
        seen.append(report.step)
        return "continue"

    run = plan(steps, **changes)
    return it.train(start, rows(it, run.sequence_len), run, on_step=note, checkpoint=path), seen


@pytest.mark.parametrize("rule", ["flexlora", "carry"])
@pytest.mark.parametrize("after", [Ranks.uniform(2), Ranks(attention=6, mlp=2), Ranks(1, 6)])
def test_a_run_goes_on_at_a_lower_rank(it: Trainer, tmp_path: Path, rule: str, after: Ranks) -> None:
    def start(ranks: Ranks) -> Start:
        if rule == "carry":
            return Start(None, served(it, 4), ranks, seed=7)
        return Start(
            {name: f.leading(ranks.of(name)) for name, f in served(it, 8).items()}, None, ranks, seed=7
        )

    path = tmp_path / "checkpoint"
    cut(it, start(Ranks.uniform(6)), path)
    same = start(Ranks.uniform(6))
    before = it.train(same, rows(it), plan(8), on_step=lambda _: "finish", checkpoint=path)
    done, seen = go_on(it, start(after), path)
    assert seen == [5, 6, 7, 8]
    assert (done.steps, done.examples) == (8, 24)
    assert done.loss_before == before.loss_before
    for name, factors in done.adapter.items():
        assert factors.rank == after.of(name)
    # What was learnt was not lost: the first loss after it is nearer to the last before than to the first.
    assert done.loss_after < done.loss_before


def test_a_run_goes_on_with_shorter_rows_and_adams_moments(it: Trainer, tmp_path: Path) -> None:
    path, start = tmp_path / "checkpoint", Start(None, None, 4, seed=7)
    cut(it, start, path)
    done, seen = go_on(it, start, path, sequence_len=20, micro_batch=1)
    assert seen == [5, 6, 7, 8]
    longer, seen = go_on(it, start, tmp_path / "checkpoint", sequence_len=64)
    assert seen == [5, 6, 7, 8]  # the checkpoint is still that of the longer rows
    whole = it.train(start, rows(it), plan(8), on_step=lambda _: "continue")
    assert all(np.array_equal(longer.adapter[n].b, whole.adapter[n].b) for n in whole.adapter)
    assert any(not np.array_equal(done.adapter[n].b, whole.adapter[n].b) for n in whole.adapter)


def test_after_going_on_at_a_lower_rank_a_run_resumes_bit_for_bit(it: Trainer, tmp_path: Path) -> None:
    """Adam's own step count and its second warm-up are in the checkpoint too."""
    path = tmp_path / "checkpoint"
    cut(it, Start(None, None, 6, seed=7), path, steps=40, at=4)
    kept = path.read_bytes()
    whole, _ = go_on(it, Start(None, None, 2, seed=7), path, steps=40)
    path.write_bytes(kept)
    cut(it, Start(None, None, 2, seed=7), path, steps=40, at=6)
    parts, seen = go_on(it, Start(None, None, 2, seed=7), path, steps=40)
    assert seen[0] == 7
    assert all(np.array_equal(parts.adapter[n].b, whole.adapter[n].b) for n in whole.adapter)
    assert all(np.array_equal(parts.adapter[n].a, whole.adapter[n].a) for n in whole.adapter)


def test_unequal_ranks_are_trained_as_they_are(it: Trainer) -> None:
    start = Start(None, None, Ranks(attention=3, mlp=40), seed=1)
    done = it.train(start, rows(it), plan(2), on_step=lambda _: "continue")
    found = ranks_of(done.adapter)
    assert {found[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")} == {3}
    assert {found[n] for n in ("gate_proj", "up_proj", "down_proj")} == {40}
